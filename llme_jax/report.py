"""What got better, and by how much: report.html and report.md of finished runs.

    python -m llme_jax.report data/outputs/pipeline --output_dir data/outputs/pipeline
    python -m llme_jax.report run-a run-b --baseline run-a

Folders stand in front of the flags: the --output_dir of train, retrieve, rank or pipeline. Both
files hold the same; report.html opens without a network. pipeline writes its report by itself.
"""

from llme_jax.config import ReportingConfig, cli
from llme_jax.errors import InputError


def main(argv: list[str]) -> int:
    argv = cli.names_in_front(argv, "runs")
    settings = cli.parse(argv, "report", __doc__, ReportingConfig).report
    if not settings.runs:
        raise InputError("there is nothing to report on: name folders of runs")

    from pathlib import Path

    from llme_jax.reports.compose import write_report  # only now, so that --help comes at once

    write_report(
        settings.runs,
        Path(settings.output_dir).expanduser(),
        metric=settings.metric,
        baseline=settings.baseline,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
