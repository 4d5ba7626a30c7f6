"""Rows with pictures: what forms they have, which pictures can be read, and what is refused."""

import base64
import json
import struct
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lorakit.data.dataset import load_samples
from lorakit.data.mixing import mix
from lorakit.data.picture_rows import counting, opened
from lorakit.data.pictures import open_picture, pictures_in
from lorakit.errors import InputError
from tiny_pictures import save_pictures

ANSWER = {"role": "assistant", "content": "red"}


def read(folder: Path, row: object, name: str = "rows.jsonl"):
    (folder / name).write_text(json.dumps(row) + "\n")
    [sample] = load_samples(folder / name)
    return sample


def png(image: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "pictures")[0]


FORMS = {
    "OpenAI's parts": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "pictures/red-0.png"}},
                    {"type": "text", "text": "which?"},
                ],
            },
            ANSWER,
        ]
    },
    "transformers' parts": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": "pictures/red-0.png"},
                    {"type": "text", "text": "which?"},
                ],
            },
            ANSWER,
        ]
    },
    "TRL's places and a column": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]},
            ANSWER,
        ],
        "images": ["pictures/red-0.png"],
    },
    "LLaMA-Factory's marks": {
        "conversations": [
            {"from": "human", "value": "<image>which?"},
            {"from": "gpt", "value": "red"},
        ],
        "images": ["pictures/red-0.png"],
    },
    "a column alone": {"question": "which?", "answer": "red", "image": "pictures/red-0.png"},
    "a list in prompt and completion": {
        "prompt": [{"role": "user", "content": "which?"}],
        "completion": [ANSWER],
        "images": ["pictures/red-0.png"],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row_gives_the_same_picture_before_the_question(
    form: str, picture: Path, tmp_path: Path
) -> None:
    sample = read(tmp_path, FORMS[form])
    assert sample.pictures == [str(picture.resolve())]
    assert sample.messages[0]["content"] == [
        {"type": "image", "image": str(picture.resolve())},
        {"type": "text", "text": "which?"},
    ]


def test_data_urls_bytes_in_parquet_and_pillow_images_are_read(
    picture: Path, tmp_path: Path
) -> None:
    data = picture.read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert open_picture(read(tmp_path, {"prompt": "?", "response": "a", "image": url}).pictures[0])
    rows = [{"question": "?", "answer": "a", "image": {"bytes": data, "path": None}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    [sample] = load_samples(tmp_path / "rows.parquet")
    image, _ = open_picture(sample.pictures[0])
    assert image.getpixel((0, 0)) == (220, 30, 30)


def test_rows_that_show_other_pictures_ask_other_questions(picture: Path, tmp_path: Path) -> None:
    rows = [
        {"question": "which?", "answer": name, "image": f"pictures/{name}-0.png"}
        for name in ("red", "blue", "red")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = load_samples(tmp_path / "rows.jsonl")
    assert len({sample.prompt_key for sample in samples}) == 2


def test_the_hash_of_pictures_is_recorded_and_changes_with_one(
    picture: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(FORMS["a column alone"]) + "\n")
    [before] = mix(file).facts
    picture.write_bytes(png(Image.new("RGB", (9, 9), "blue")))
    [after] = mix(file).facts
    assert before.sha256 == after.sha256
    assert before.pictures_sha256 != after.pictures_sha256
    file.write_text('{"question": "which?", "answer": "red"}\n')
    assert "pictures_sha256" not in mix(file).facts[0].to_dict()


REFUSED = {
    "missing": ({"image": "pictures/red-1.png"}, "did you mean 'red-0.png'"),
    "a folder": ({"image": "pictures"}, "is a folder"),
    "outside": ({"image": "../secret.png"}, "outside"),
    "absolute": ({"image": "/etc/passwd"}, "outside"),
    "a link outside": ({"image": "pictures/link.png"}, "outside"),
    "a file URL outside": ({"image": "file:///etc/passwd"}, "outside"),
    "the web": ({"image": "https://example.com/a.png"}, "data.fetch_images"),
    "a number": ({"image": 3}, "expected the path"),
    "NUL": ({"image": "a\0b.png"}, "NUL"),
    "a name without an end": ({"image": "a" * 5000}, "cannot be looked for"),
    "no data": ({"image": "data:image/png"}, "without a comma"),
    "a mark too many": (
        {"question": "<image><image>which?", "image": "pictures/red-0.png"},
        "1 picture in its columns and 2 places",
    ),
    "a mark too few": (
        {"question": "<image>?", "images": ["pictures/red-0.png", "pictures/red-0.png"]},
        "2 pictures in its columns and 1 place",
    ),
    "in an answer": (
        {"answer": "<image>", "question": "draw", "image": "pictures/red-0.png"},
        "an answer, has a picture",
    ),
    "beside a pair": (
        {"prompt": "?", "chosen": "a", "rejected": "b", "image": "pictures/red-0.png"},
        "preference pair",
    ),
    "a video": ({"video": "a.mp4"}, "'video'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_line_that_names_the_row(
    case: str, picture: Path, tmp_path: Path
) -> None:
    (tmp_path.parent / "secret.png").write_bytes(png(Image.new("RGB", (4, 4))))
    (tmp_path / "pictures" / "link.png").symlink_to(tmp_path.parent / "secret.png")
    changes, reason = REFUSED[case]
    row = changes if "chosen" in changes else {"question": "which?", "answer": "red", **changes}
    with pytest.raises(InputError) as raised:
        read(tmp_path, row)
    message = str(raised.value)
    assert message.startswith("rows.jsonl:1: ")
    assert reason in message
    assert "\n" not in message


def test_a_folder_that_is_named_is_where_pictures_are_read(picture: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    row = {"question": "which?", "answer": "red", "image": "red-0.png"}
    with pytest.raises(InputError, match="no such picture"):
        read(data, row)
    with pictures_in(picture.parent):
        assert read(data, row).pictures == [str(picture.resolve())]
    with pytest.raises(InputError, match="is not a folder"), pictures_in(tmp_path / "nowhere"):
        pass


def of(tmp_path: Path, data: bytes) -> str:
    (tmp_path / "picture").write_bytes(data)
    return str(tmp_path / "picture")


def test_pictures_of_every_mode_become_rgb(tmp_path: Path) -> None:
    done = Counter[str]()

    def pixel(data: bytes) -> tuple[int, ...]:
        with counting(done):
            [image] = opened([of(tmp_path, data)])
        assert image.mode == "RGB"
        return image.getpixel((0, 0))

    buffer = BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(buffer, "JPEG", quality=100)
    red, green, blue = pixel(buffer.getvalue())
    assert red > 240
    assert max(green, blue) < 15
    assert not done
    assert pixel(png(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert pixel(png(palette, transparency=1)) == (255, 255, 255)
    wide = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    assert pixel(png(wide)) == (128, 128, 128)
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    buffer = BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert pixel(buffer.getvalue())[0] > 250
    assert pixel(png(Image.new("1", (2, 2), 1))) == (255, 255, 255)
    assert sorted(done.values()) == [1, 1, 2]  # 16 bits, animated, transparent


def test_a_picture_stands_upright_as_its_exif_data_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "blue")
    image.paste((255, 0, 0), (0, 0, 4, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright, _ = open_picture(of(tmp_path, png(image, exif=exif)))
    assert upright.size == (4, 8)
    assert upright.getpixel((0, 0)) == (255, 0, 0)
    assert upright.getpixel((0, 7)) == (0, 0, 255)


def test_a_file_that_is_cut_off_behind_its_last_pixel_is_read_and_counted(tmp_path: Path) -> None:
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    whole, done = png(image), Counter[str]()
    for cut in range(1, 13):  # a chunk of 12 bytes ends it
        with counting(done):
            [found] = opened([of(tmp_path, whole[:-cut])])
        assert found.tobytes() == image.tobytes()
    [(what, times)] = done.items()
    assert times == 12
    assert "cut off" in what
    with pytest.raises(InputError, match="damaged"):
        opened([of(tmp_path, whole[:-60])])
    buffer = BytesIO()
    image.save(buffer, "JPEG")
    with pytest.raises(InputError, match="damaged"):
        opened([of(tmp_path, buffer.getvalue()[:-1])])


def bomb() -> bytes:
    """A PNG of some hundred bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a picture"),
        (b"hello", "not a picture"),
        (bomb(), "pixels"),
        (png(Image.effect_noise((64, 64), 90).convert("RGB"))[:900], "damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        opened([of(tmp_path, data)], "rows.jsonl:3")
    assert str(raised.value).startswith("rows.jsonl:3: the picture picture ")
    assert reason in str(raised.value)


def test_reading_text_does_not_import_pillow(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "rows.jsonl").write_text('{"question": "which?", "answer": "red"}\n')
    code = (
        "import sys; from lorakit.data.dataset import load_samples; "
        f"load_samples({str(tmp_path / 'rows.jsonl')!r}); sys.exit('PIL' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
