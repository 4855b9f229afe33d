"""A table of images is read whole, and everything that is wrong with it is told at once."""

from pathlib import Path

import pytest

from crafts_core.image_requests import (
    MAX_IMAGES,
    ImageRequest,
    RequestError,
    num_images,
    read_requests,
)


def table(folder: Path, text: str, name: str = "images.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_row_is_one_kind_of_image(tmp_path: Path) -> None:
    (tmp_path / "cells.png").write_bytes(b"")
    rows = read_requests(
        table(
            tmp_path,
            "caption,type,growth_pattern,features,negative,count,seed,control,mask\n"
            '"H&E, glands",,,,necrosis,3,7,,\n'
            ",LUAD,papillae,necrosis; Many_Lymphocytes,,,,nuclei,cells.png\n",
        ),
        count=2,
    )
    assert rows == [
        ImageRequest(prompt="H&E, glands", negative_prompt="necrosis", count=3, seed=7),
        ImageRequest(
            prompt="H&E, lung adenocarcinoma, lung, papillae, necrosis, many lymphocytes",
            count=2,
            control="nuclei",
            mask=tmp_path / "cells.png",
        ),
    ]


def test_lines_of_text_are_captions(tmp_path: Path) -> None:
    rows = read_requests(table(tmp_path, "\ufefflung\n\n  colon \n", "prompts.txt"), count=4)
    assert rows == [ImageRequest(prompt="lung", count=4), ImageRequest(prompt="colon", count=4)]


def test_tabs_and_json_lines_say_the_same(tmp_path: Path) -> None:
    tabs = table(tmp_path, "type\tfeatures\tcount\nCOAD\tnecrosis;colloid\t2\n", "a.tsv")
    lines = '{"type": "COAD", "features": ["necrosis", "colloid"], "count": 2, "seed": null}\n'
    assert read_requests(tabs, count=1) == read_requests(table(tmp_path, lines, "a.jsonl"), count=1)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_ends_where_the_file_says(tmp_path: Path, name: str) -> None:
    caption = "gl\u2028an\x85ds"
    text = f'{{"caption": "{caption}"}}' if name == "a.jsonl" else caption
    rows = read_requests(table(tmp_path, f"{text}\n", name), count=1)
    assert [row.prompt for row in rows] == [caption]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("caption,kind\nlung,x\n", "row 2: unknown column 'kind'"),
        ("caption,type\nlung,LUAD\n", "not both"),
        ("caption,count\n,3\n", "neither a caption nor a type"),
        ("type\nXXXX\n", "unknown cancer type 'XXXX'"),
        ("caption,count\nlung,0\n", "count must be a whole number from 1"),
        ("caption,count\nlung,1e8\n", "got '1e8'"),
        (f"caption,count\nlung,{'9' * 5000}\n", "count must be a whole number from 1"),
        ("caption,seed\nlung,-1\n", "seed must be a whole number from 0"),
        ("type,stroma\nLUAD,lots\n", "stroma 'lots' is none of"),
        ("caption,control\nlung,nuclei\n", "control and mask belong together"),
        ("caption,control,mask\nlung,nuclei,no.png\n", "there is no mask"),
        (f"caption,control,mask\nlung,nuclei,{'m' * 300}.png\n", "there is no mask"),
        ("caption,count\nlung\n", "other columns than the header"),
        ("caption,count, count\nlung,1,2\n", "column 'count' is there twice"),
        ("caption\n", "asks for no image"),
        ("", "asks for no image"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(RequestError) as error:
        read_requests(table(tmp_path, text), count=1)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["NaN", "1e999", "true", '{"a": 1}', "[1]", "[[]]"])
def test_json_that_is_no_words_and_no_number_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(RequestError, match="row 1: 'caption' is neither text nor a number"):
        read_requests(table(tmp_path, f'{{"caption": {value}}}\n', "a.jsonl"), count=1)


def test_all_wrong_rows_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"row 2: .*; row 3: .*and 3 more"):
        read_requests(table(tmp_path, "type\n" + "XXXX\n" * 8), count=1)


@pytest.mark.parametrize(("name", "content"), [("a.xlsx", b"x"), ("a.csv", b"\xff\xfe\xff")])
def test_another_kind_of_file_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=name):
        read_requests(tmp_path / name, count=1)


def test_more_than_one_run_draws_is_refused() -> None:
    half = ImageRequest(prompt="lung", count=MAX_IMAGES // 2)
    assert num_images([half, half]) == MAX_IMAGES
    with pytest.raises(RequestError, match="more than one run draws"):
        num_images([half, half, ImageRequest(prompt="lung")])
