"""Bad input that hypothesis makes of valid files, for `bad_input_test.py`.

A JSON file has one of its values replaced, a file some of its bytes, a setting any value. What
comes of it must be an error of the kit, or pairs and items that are sound: captions with text that
UTF-8 can write, ids that differ. The examples are the same at every run.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from bad_input_cases import (
    coco,
    coco_data,
    encoded,
    flickr,
    image_file,
    photo,
    shard,
    table,
    winoground,
    write,
)
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdsclip_nb.experiment import Experiment, make_experiment
from sdsclip_nb.recorded_scores import RecordedScorer

EXAMPLES = 40  # of each kind
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**30, -1, 1.5, math.nan, math.inf, "", " ", "\0", "\ud800", "1", "../x"]),
    st.sampled_from(["/etc/passwd", "a" * 300, [], {}, [[]], [None], {"raw": 5}, "1.jpg", "0a"]),
    st.text(max_size=8),
)


def places(data, path: tuple = ()) -> list[tuple]:
    "The path of every value in JSON"
    found = [path] if path else []
    if isinstance(data, dict | list):
        keys = data if isinstance(data, dict) else range(len(data))
        for key in keys:
            found += places(data[key], (*path, key))
    return found


def put(data, path: tuple, value) -> None:
    "Replace a value in JSON"
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def sound(data):
    "The same pairs or suite. Raises AssertionError if no model can take them"
    pairs = hasattr(data, "root")  # or a suite
    for caption in [c for item in data.items for c in item.captions] if pairs else data.captions:
        assert isinstance(caption, str) and caption.strip(), caption
        caption.encode()
    ids = [item.id for item in data.items] if pairs else data.ids
    assert len(ids) == len(set(ids)), "an id comes twice"
    return data


def changed_json(load: Callable, example) -> Callable:
    "Loads a JSON file with one value replaced"
    paths = places(example)

    @given(st.sampled_from(paths), VALUES, st.sampled_from(["raise", "skip"]))
    def check(judge, path, value, on_error):
        def run(folder):
            return sound(load(lambda data: put(data, path, value))(folder, on_error))

        judge(run)

    return check


def changed_bytes(load: Callable, valid: bytes) -> Callable:
    "Loads a file with some of its bytes replaced, or cut"
    change = st.tuples(st.integers(0, len(valid) - 1), st.integers(0, 255))

    @given(st.lists(change, min_size=1, max_size=4), st.integers(0, 3))
    def check(judge, changes, cut):
        data = bytearray(valid)
        for place, value in changes:
            data[place] = value
        content = bytes(data[: len(data) // 2] if cut == 0 else data)

        def run(folder):
            found = load(content)(folder, "skip")
            return found if isinstance(found, pd.DataFrame) else sound(found)

        judge(run)

    return check


@given(st.text('ab.png,"\n\r\t \0é;', max_size=60))
def csv_text(judge, text):
    "Loads a table of any text"

    def run(folder):
        return sound(table(f"image,caption\na.png,a dog\n{text}")(folder, "skip"))

    judge(run)


@given(st.sampled_from(sorted(Experiment.model_fields)), VALUES)
def any_setting(judge, name, value):
    "Makes an experiment with one setting of any value"

    def run(folder):
        try:
            make_experiment(**{name: value})
        except ValueError as error:
            assert name in str(error), error
            raise

    judge(run)


TERMS = ("clip", "sds", "hardneg", "rank")
RANKS, CAPTIONS = ("permuted-rankings", "labels"), ("shuffled-captions", "empty-caption")


@given(
    st.lists(st.sampled_from(TERMS), min_size=1, max_size=3),
    st.sampled_from(("none", *RANKS, *CAPTIONS)),
    st.lists(st.sampled_from(("exchanges", "nearest", "x")), min_size=1, max_size=2),
)
def control_of_rank(judge, terms, control, kinds):
    "Checks a run of any terms, control and caption candidates"
    from sdsclip_nb.training import check_run

    wrong = set()
    if len(set(terms)) < len(terms):
        wrong.add("loss=")
    if "x" in kinds or len(set(kinds)) < len(kinds):
        wrong.add("rank_candidates=")
    if not wrong and control in RANKS and "rank" not in terms:
        wrong.add("control=")
    if not wrong and control in CAPTIONS and "rank" in terms and "sds" not in terms:
        wrong.add("control=")

    def run(folder):
        settings = dict(loss="+".join(terms), control=control, rank_candidates="+".join(kinds))
        try:
            check_run(hub=False, **settings)
        except ValueError as error:
            assert wrong, f"refused: {error}"
            assert all(name in str(error) for name in wrong), error
            raise
        assert not wrong, f"taken in spite of {wrong}"

    judge(run)


def score_file(content: bytes) -> Callable:
    "Reads a file of scores"

    def load(folder, on_error):
        write(folder / "scores.csv", content)
        return RecordedScorer(folder / "scores.csv").table

    return load


def flickr_entries() -> list:
    "Three entries of Flickr30k"
    return [
        dict(filename=f"{k}.jpg", split="train", sentences=[dict(raw=f"caption {k}")])
        for k in range(3)
    ]


def winoground_entries() -> list:
    "Three items of Winoground"
    return [
        dict(id=k, image_0=f"{k}a", image_1=f"{k}b", caption_0=f"one {k}", caption_1=f"other {k}",
             num_main_preds=1, collapsed_tag="Object")
        for k in range(3)
    ]  # fmt: skip


def tar_bytes() -> bytes:
    "A shard of two good samples"
    with TemporaryDirectory() as folder:
        shard()(Path(folder), "raise")
        return (Path(folder) / "train-0.tar").read_bytes()[:4096]


SCORES = b"image,caption,score\n" + b"".join(b"%d,a dog %d,0.%d\n" % (k, k, k) for k in range(5))


def kinds() -> dict[str, Callable]:
    "name -> property"
    whole = tar_bytes()
    rest = bytes(6144)
    return {
        "COCO": changed_json(coco, json.loads(json.dumps(coco_data()))),
        "Flickr30k": changed_json(flickr, flickr_entries()),
        "Winoground": changed_json(winoground, winoground_entries()),
        "CSV": csv_text,
        "PNG": changed_bytes(image_file, encoded(photo(5, (40, 30)))),
        "JPEG": changed_bytes(image_file, encoded(photo(5, (40, 30)), "JPEG")),
        "tar": changed_bytes(lambda data: shard(after=lambda _: data + rest), whole),
        "score file": changed_bytes(score_file, SCORES),
        "setting": any_setting,
        "control of rank": control_of_rank,
    }


def bounded(check: Callable) -> Callable:
    "A property with its number of examples, the same at every run"
    few = settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return few(check)
