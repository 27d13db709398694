"""Names that somebody gave to latents, in a JSON file: `{"12": "HTTP requests", "40": "closing brackets"}`."""

import json
from pathlib import Path

from saepipe.durable import fits
from saepipe.errors import UserError


def read(path: str | Path, d_sae: int) -> dict[int, str]:
    """Read the names of latents.

    Args:
        path: The file.
        d_sae: Number of latents of the SAE.

    Raises:
        UserError: The file is not there, is no such mapping, or names a latent that the SAE does not have.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"analyze.labels={path} cannot be read ({error.strerror}); name a JSON file") from None
    except (ValueError, RecursionError):
        document = None
    if not fits(document, dict[str, str]):
        raise UserError(
            f"analyze.labels={path} holds no names of latents; write them as JSON, such as " + '{"12": "HTTP requests"}'
        )
    for number in document:
        # Python turns no number of thousands of digits into an integer.
        if not (number.isascii() and number.isdecimal() and len(number) < 20 and int(number) < d_sae):
            raise UserError(f"analyze.labels={path} names latent {number!r:.40}; the SAE has 0 to {d_sae - 1}")
    return {int(number): name for number, name in document.items()}
