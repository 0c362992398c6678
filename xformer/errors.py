"""The errors that a user can cause. The command line prints their one sentence and exits with their code."""

import re


class UserError(Exception):
    """Something outside the program must change; the message says what is wrong, where, and what to do."""

    exit_code = 2


class SettingsError(UserError):
    """A setting is unknown, of the wrong type, or impossible."""


class CorpusError(UserError):
    """A corpus cannot be read or holds nothing."""


class StoreError(UserError):
    """A feature store is missing, damaged, incomplete, or made in another way than is asked for."""

    def __str__(self) -> str:
        return re.sub(r"\bs3:/(?!/)", "s3://", super().__str__())  # pathlib folds a URL's slashes


class WeightsError(UserError):
    """Weights are missing, damaged, or belong to another architecture."""


class CheckpointError(UserError):
    """A run directory holds no usable checkpoint."""


class TrainingError(UserError):
    """Training cannot go on, for example because the loss is not finite."""


class Stopped(UserError):
    """Ctrl-C or SIGTERM during training; the run is saved at the step that the message names."""

    exit_code = 130


class EvaluationError(UserError):
    """Questions, annotations and answers do not belong together."""
