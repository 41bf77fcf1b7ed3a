"""Training: the task that is trained, the step, the loop, what a run writes."""
