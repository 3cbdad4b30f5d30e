"""logs/rank-N.log: what one rank did, to be read after a failure."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger("cifar_dist")


class _LogFile(logging.FileHandler):
    """Ignores a full disk: errors that matter are raised where checkpoints and metrics are written."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Print nothing; the standard library would print a traceback for every line."""

    def close(self) -> None:
        with suppress(OSError):  # closing flushes lines that could not be written before
            super().close()


@contextmanager
def rank_log(path: Path) -> Iterator[None]:
    """Write the logger "cifar_dist" to `path` inside, and the traceback of an exception that leaves it.

    Raises:
        OSError: the file cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        logger.error("stopped by %s", type(error), exc_info=error)
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
