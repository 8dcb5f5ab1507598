"""What the commands share: words of their help, and the silence of the libraries below."""

import logging
import warnings


MINIWORLD_HELP = "`miniworld` is the embedded one"


def quiet() -> None:
    """Without the notices of the libraries below that a reader of the output can do nothing about."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
