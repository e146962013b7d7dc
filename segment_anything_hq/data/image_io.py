"""Read images as RGB arrays and masks as int8 label arrays, from any common file format and color mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from rfmedsam2.arguments import option
from rfmedsam2.errors import ImageError
from rfmedsam2.system.ordinary_files import require_ordinary
from segment_anything_hq.choices import MaskRule
from segment_anything_hq.data.doubts import warn_of_mask, warn_once
from segment_anything_hq.prompts.clicks import IGNORE

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pbm", ".pgm", ".ppm")
# only these decoders: some of Pillow's others start external programs
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
DARK = 2**13
"""Images of 16 bits below this value may hold 12 bits, which are the lower ones."""
_BITS, _MEANING, _PLANES, _KIND = 258, 262, 284, 339  # TIFF tags


def read_image(path: Path) -> np.ndarray:
    """Read an image of any color mode.

    Gray and palette images become RGB, transparency is dropped, 16 bits become 8, and the EXIF orientation is applied;
    of several pages, or of an animation, the first is read, with a warning.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ImageError: the file is missing, damaged or not an image.
    """
    with _opened(path) as image:
        if (pages := _pages(image)) > 1:
            warn_once(path, "Only the first image of a file is read", f"of {pages}")
        image = ImageOps.exif_transpose(image)
        channels = _channels(image, path)
    return np.ascontiguousarray(np.broadcast_to(channels, (*channels.shape[:2], 3)))


def read_ground_truth(path: Path, rule: MaskRule = "above_128") -> np.ndarray:
    """Read a mask of any color mode, upright; what is transparent is background, unless everything is equally so.

    Values that hint at another meaning are warned of (`data.doubts`).

    Returns:
        (H, W) int8: 1 object, 0 background, -1 ignored.

    Raises:
        ImageError: the file is missing, damaged or not an image, holds several, or its values do not allow this rule.
    """
    with _opened(path) as image:
        if (pages := _pages(image)) > 1:
            raise ImageError(
                "The file holds several masks",
                where=path,
                expected="one mask per file",
                found=f"{pages} of {image.width} x {image.height} pixels",
                remedy="Save each as a file of its own, named like its image with _1, _2 ... added",
            )
        if rule == "any" and _is_narrowed(image):
            raise ImageError(
                "Every value but 0 is to be object, but of 16 bits per color only the upper 8 are read",
                where=path,
                expected="one channel, or 8 bits per channel",
                found=f"{len(image.getbands())} channels of 16 bits",
                remedy="Save the masks as gray PNG from their source",
            )
        compression = _loses(image, path)
        values = _mask_values(image, path)
    if rule == "any":
        if compression is not None and len(np.unique(values)) > 2:
            raise ImageError(
                f"Every value but 0 is to be object, but {compression} compression changes the 0 of the background",
                where=path,
                found=f"{len(np.unique(values))} values",
                remedy="Save the masks as PNG from their source, or leave "
                f"{option('rule', flag='--mask-rule')} out: object above 128",
            )
        ground_truth = np.asarray((values > 0).any(-1), np.int8)
    else:
        first = _as_8_bits(values, path)[..., 0]
        ground_truth = (first > 128).astype(np.int8)
        if rule == "ignore_128":
            ground_truth[first == 128] = IGNORE
    warn_of_mask(path, values, ground_truth, rule, exact=compression is None)
    return ground_truth


def read_mask_values(path: Path) -> np.ndarray:
    """Read the values of a mask as stored, gray (H, W, 1) or RGB (H, W, 3), uint8 or wider; transparent pixels are 0.

    Raises:
        ImageError: the file is missing, damaged or not an image, or holds negative numbers.
    """
    with _opened(path) as image:
        return _mask_values(image, path)


def read_thumbnails(path: Path, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Read small gray copies of an image, upright, each (H, W) uint8; a JPEG is decoded no larger than needed.

    Args:
        path: the image.
        shapes: H and W of each, far below 64.

    Raises:
        ImageError: the file is missing, damaged or not an image.
    """
    with _opened(path) as image:
        image.draft("L", (128, 128))  # 64 changes some looks
        upright = ImageOps.exif_transpose(image)
        channels = _channels(upright, path)
        gray = Image.fromarray(channels if channels.shape[2] == 3 else channels[..., 0]).convert("L")
        return [np.asarray(gray.resize((width, height), Image.Resampling.BOX)) for height, width in shapes]


def image_size(path: Path) -> tuple[int, int]:
    """Read the height and width of an image or a mask, upright, from a file's header.

    Raises:
        ImageError: the file is missing, damaged or not an image.
    """
    with _opened(path) as image:
        width, height = image.size
        # Pillow gives the upright size of a TIFF itself
        turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


class _opened:  # noqa: N801  used as a function
    """Open an image lazily; Pillow's exceptions while it is open become `ImageError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Image.Image:
        try:
            require_ordinary(self.path)
            self.image = Image.open(self.path, formats=_FORMATS)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _image_error(self.path, error) from error
        if self.image.format == "TIFF":
            self.image.filename = ""  # Pillow garbles a TIFF turned by 90 degrees if it maps the file into memory
            self.image.info["meaning"] = self.image.tag_v2.get(_MEANING)  # pyright: ignore[reportAttributeAccessIssue]
            try:
                _require_kept_values(self.image, self.path)
            except ImageError:
                self.image.close()
                raise
        return self.image

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.image.close()
        if isinstance(error, (OSError, SyntaxError, ValueError)) and not isinstance(error, ImageError):
            raise _image_error(self.path, error) from error


def _image_error(path: Path, error: BaseException) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError("The file does not exist", where=path)
    return ImageError(
        "The file cannot be read as an image",
        where=path,
        expected="an undamaged file of type " + ", ".join(sorted(e[1:] for e in ENDINGS)),
        found=str(error).splitlines()[0] if str(error) else type(error).__name__,
    )


def _require_kept_values(image: Image.Image, path: Path) -> None:
    """Check that Pillow reads the values of a TIFF as they are stored.

    Raises:
        ImageError: it takes negative numbers of 8 bits for large ones, and halves of 16 bits for colors.
    """
    tags: dict = getattr(image, "tag_v2", {})
    bits, found = tags.get(_BITS, (1,)), None
    if tags.get(_KIND, (1,))[0] == 2 and bits[0] == 8:
        found = "8 bits with a sign"
    elif tags.get(_PLANES) == 2 and len(bits) > 1 and bits[0] > 8:
        found = f"{len(bits)} channels of {bits[0]} bits, one after the other"
    if found is not None:
        raise ImageError(
            "This kind of TIFF is not supported",
            where=path,
            expected="8 bits without a sign, 16 bits, or colors pixel by pixel",
            found=found,
            remedy="Save it as PNG from its source",
        )


def _pages(image: Image.Image) -> int:
    """Number of images in a file; those of another size, and those behind a JPEG, are previews."""
    if image.format == "MPO" or getattr(image, "n_frames", 1) == 1:
        return 1
    sizes = [page.size for page in ImageSequence.Iterator(image)]
    image.seek(0)
    return sizes.count(image.size)


def _channels(image: Image.Image, path: Path) -> np.ndarray:
    """Without transparency: (H, W, 1) or (H, W, 3) uint8."""
    mode = image.mode
    if mode.startswith("I"):
        values = _whole_numbers(image, path)
        if np.iinfo(np.uint8).max < (most := values.max(initial=0)) < DARK:
            warn_once(path, "An image of 16 bits is nearly black", f"its largest value is {most} of 65535")
        return _as_8_bits(values, path)
    if mode == "F":
        raise ImageError("The image holds floating-point numbers", where=path, expected="8 or 16 bits per channel")
    if mode in ("L", "1", "LA", "La"):
        return np.array(image.convert("L"))[..., None]
    if mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    if mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


def _mask_values(image: Image.Image, path: Path) -> np.ndarray:
    """(H, W, 1) or (H, W, 3), uint8 or wider: the stored values, upright, on black where the image is transparent."""
    image = ImageOps.exif_transpose(image)
    whole = image.mode.startswith("I")
    values = _whole_numbers(image, path) if whole else _channels(image, path)
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        if whole:
            alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        else:
            alpha = np.asarray(image.convert("RGBA"))[..., 3:]
        if (alpha != alpha[0, 0]).any():
            # rounded up: a little of 1 is not background
            seen = ((values.astype(np.uint32) * alpha + 254) // 255).astype(values.dtype)
            return seen if seen.any() else alpha  # a black shape on a transparent ground
    return values


def _is_narrowed(image: Image.Image) -> bool:
    """Whether Pillow drops the lower half of 16 bits, as it does of colors, and of gray beside transparency."""
    sixteen = image.format in ("PNG", "TIFF") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    return sixteen and not image.mode.startswith("I")


def _loses(image: Image.Image, path: Path) -> str | None:
    """The compression of a file, if it changes values."""
    if image.format in ("JPEG", "MPO") or image.info.get("compression") in ("jpeg", "tiff_jpeg"):
        return "JPEG"
    # the mark of WebP without loss
    return "WebP" if image.format == "WEBP" and b"VP8L" not in path.read_bytes() else None


def _whole_numbers(image: Image.Image, path: Path) -> np.ndarray:
    """(H, W, 1) of 16 or 32 bits."""
    values = np.asarray(image)[..., None]
    if values.dtype == np.uint16 and image.info.get("meaning") == 0:
        values = np.iinfo(np.uint16).max - values  # 0 is white: Pillow inverts 8 bits only
    if values.min(initial=0) < 0:
        raise ImageError("The image holds negative numbers", where=path, expected="0 and above", found=values.min())
    return values


def _as_8_bits(values: np.ndarray, path: Path) -> np.ndarray:
    """uint8: values above 255 are taken for 16 bits."""
    most = values.max(initial=0)
    if most > np.iinfo(np.uint16).max:
        raise ImageError("The image holds numbers of 32 bits", where=path, expected="at most 65535", found=most)
    return (values >> 8 if most > np.iinfo(np.uint8).max else values).astype(np.uint8)
