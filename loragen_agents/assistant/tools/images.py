"""Tools for pictures in the folder, with Pillow. Each writes a new file beside the picture and changes none.

Faces are left out: OpenCV 5 ships no detector that needs no further download, and 60 MB for one tool is too much.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loragen_agents.assistant.results import Result, Table
from loragen_agents.assistant.tools.context import Context, Folder, ToolError
from loragen_agents.assistant.tools.files import size_text

if TYPE_CHECKING:
    from PIL.Image import Image

# Larger pictures would take a small machine's memory.
MAX_PIXELS = 60_000_000
_ENDINGS = {
    "png": ".png",
    "jpeg": ".jpg",
    "jpg": ".jpg",
    "webp": ".webp",
    "gif": ".gif",
    "bmp": ".bmp",
    "tiff": ".tiff",
}
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".tiff": "TIFF"}


def tools(context: Context) -> dict[str, Callable[..., Result]]:
    folder = context.folder

    def image_size(image_path: str) -> Result:
        file, image = _open(folder, image_path)
        facts = (
            ("Width", f"{image.width} px"),
            ("Height", f"{image.height} px"),
            ("Format", image.format or "?"),
            ("Colours", image.mode),
            ("Size", size_text(file.stat().st_size)),
        )
        text = f"{folder.name(file)} is {image.width} x {image.height} pixels ({image.format})."
        return Result(text, Table(("What", "Value"), facts))

    def crop_image(image_path: str, left: int, top: int, width: int, height: int) -> Result:
        file, image = _open(folder, image_path)
        right, bottom = min(left + width, image.width), min(top + height, image.height)
        if left < 0 or top < 0 or width < 1 or height < 1 or left >= right or top >= bottom:
            raise ToolError(f"the rectangle lies outside the picture, which is {image.width} x {image.height} pixels")
        return _save(folder, file, image.crop((left, top, right, bottom)), "cropped")

    def resize_image(image_path: str, width: int, height: int | None = None) -> Result:
        file, image = _open(folder, image_path)
        tall = height or max(1, round(image.height * width / image.width))
        if width < 1 or tall < 1 or width * tall > MAX_PIXELS:
            raise ToolError(f"a picture of {width} x {tall} pixels can't be made; give 1 to some thousand pixels")
        plain = image.convert("RGBA") if image.mode == "P" else image
        return _save(folder, file, plain.resize((width, tall)), "resized")

    def rotate_image(image_path: str, degrees: float) -> Result:
        file, image = _open(folder, image_path)
        return _save(folder, file, image.rotate(-degrees, expand=True), "rotated")

    def convert_image(image_path: str, format: str) -> Result:
        ending = _ENDINGS.get(format.strip().lower().lstrip("."))
        if ending is None:
            raise ToolError(f"{format!r} is no picture format; expected one of {', '.join(_ENDINGS)}")
        file, image = _open(folder, image_path)
        return _save(folder, file, image, "", ending)

    def grey_image(image_path: str) -> Result:
        file, image = _open(folder, image_path)
        return _save(folder, file, image.convert("L"), "grey")

    def edges(image_path: str) -> Result:
        from PIL import ImageFilter

        file, image = _open(folder, image_path)
        smooth = image.convert("L").filter(ImageFilter.GaussianBlur(1))
        drawn = smooth.filter(ImageFilter.FIND_EDGES).crop((1, 1, image.width - 1, image.height - 1))
        return _save(folder, file, drawn if min(drawn.size) > 0 else smooth, "edges", ".png")

    functions = (image_size, crop_image, resize_image, rotate_image, convert_image, grey_image)
    return {**{tool.__name__: tool for tool in functions}, "Edge Detection On Image": edges}


def _open(folder: Folder, given: str) -> "tuple[Path, Image]":
    """A picture, upright and whole in memory.

    Raises:
        ToolError: there is no such file, it is no picture, or it is too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    file = folder.file(given)
    try:
        with Image.open(file) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ToolError(f"{folder.name(file)} has more than {MAX_PIXELS // 1_000_000} million pixels")
            kind = opened.format
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            image = upright.copy()
            image.format = kind
            return file, image
    except UnidentifiedImageError as error:
        raise ToolError(f"{folder.name(file)} is no picture") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ToolError(f"{folder.name(file)} can't be read as a picture: {error}") from error


def _save(folder: Folder, source: Path, image: "Image", what: str, ending: str | None = None) -> Result:
    """Write a picture beside its source under a name that is still free."""
    suffix = ending or source.suffix.lower().replace(".jpeg", ".jpg")
    if suffix not in _FORMATS:
        suffix = ".png"
    target = folder.free(source.with_name(f"{source.stem}{'-' + what if what else ''}{suffix}"))
    if suffix in (".jpg", ".bmp") and image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    image.save(target, format=_FORMATS[suffix])
    return Result(f"Saved {folder.name(target)} ({image.width} x {image.height} pixels).")
