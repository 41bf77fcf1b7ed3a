"""Language models: prompts, likelihood of answers, teacher scores."""
