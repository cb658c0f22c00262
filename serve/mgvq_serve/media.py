"""From an image URL to the bytes of a picture (called by `chat` in a thread of its pool).

Data URLs always; `file://` only under the folder the operator allowed; nothing is ever fetched from
a network. Byte and pixel limits are `mgvq_runtime.MediaLimits`, checked on the header; whether
pixels must be decoded at all, and what the model makes of them, is the runtime's business.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mgvq_runtime import EncodedImage, MediaLimits, open_data_url, open_image
from mgvq_runtime.multimodal.image import LOW_DETAIL_SIDE
from mgvq_serve.errors import ApiError, shorten

TOTAL_PIXELS_FACTOR = 2  # all pictures of a request together, in largest pictures


class ImageLoader:
    """Loads pictures within limits."""

    def __init__(self, limits: MediaLimits, local_media_path: Path | None) -> None:
        """Set limits and the folder that `file://` may read, or None for no files."""
        self.limits = limits
        self.local_root = local_media_path.resolve() if local_media_path else None

    def load(self, url: str, detail: str | None, param: str) -> EncodedImage:
        """Return the picture behind a URL.

        Args:
            url: A data URL, or a file URL where the operator allowed it.
            detail: "low" scales the picture into a square of 512 pixels.
            param: Name of the field, for errors.

        Raises:
            ApiError: 400 for a scheme that is not served, 403 for a file that may not be read.
            ImageError: if the bytes are not a picture within the limits.
        """
        scheme = url[:16].partition(":")[0].strip().lower()
        if scheme == "data":
            image = open_data_url(url, self.limits)
        elif scheme == "file":
            image = open_image(self._read_file(url, param), self.limits)
        elif scheme in ("http", "https"):
            raise ApiError(
                400,
                "remote images are not supported in this release; send the picture itself as a "
                "data URL: data:image/png;base64,...",
                param=param,
                code="remote_images_unsupported",
            )
        else:
            raise ApiError(
                400,
                f"the URL of an image must be a data URL (data:image/png;base64,...), got "
                f"{shorten(url, 40)!r}",
                param=param,
                code="invalid_image_url",
            )
        max_side = LOW_DETAIL_SIDE if detail == "low" else None
        return replace(image, max_side=max_side, param=param)

    def check_total(self, images: Sequence[EncodedImage], param: str) -> None:
        """Refuse pictures that are too large together: all of them may have to be decoded.

        Raises:
            ApiError: 400 naming the picture that was one too many.
        """
        total = sum(image.size[0] * image.size[1] for image in images)
        most = TOTAL_PIXELS_FACTOR * self.limits.max_image_pixels
        if total > most:
            raise ApiError(
                400,
                f"the images of this request have {total} pixels up to this one, at most {most} "
                "are allowed",
                param=param,
                code="images_too_large",
            )

    def _read_file(self, url: str, param: str) -> bytes:
        forbidden = ApiError(
            403,
            "files are read only below the folder given as --allowed-local-media-path",
            error_type="permission_error",
            code="file_not_allowed",
            param=param,
        )
        missing = ApiError(400, "there is no such file", param=param, code="file_not_found")
        if self.local_root is None:
            raise forbidden
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path)).resolve()  # follows links before the check below
        except (ValueError, OSError, RuntimeError):
            raise missing from None
        if parts.netloc not in ("", "localhost") or not path.is_relative_to(self.local_root):
            raise forbidden
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise missing
            with path.open("rb") as file:
                return file.read(
                    self.limits.max_image_bytes + 1
                )  # one more: the decoder refuses it
        except OSError:
            raise missing from None
