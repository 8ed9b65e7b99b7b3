"""Shards named by braces and globs, and keys of a recipe that name them; labels and indexes of other tools."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from framework.config import loading
from framework.config.recipe import Data, Recipe
from framework.data.packing.packer import Packing, pack_splits, training_needs
from framework.data.packing.readers import read
from framework.data.packing.reading import Choices
from framework.data.shards.index import ShardSet
from framework.data.shards.naming import check_one_series, cut_pattern, is_split, matching, series
from framework.data.shards.remote import open_remote
from framework.data.splits import Splits
from framework.runtime.errors import UserError
from tests.support.commands import run_tool
from tests.support.http_store import serve
from tests.support.toy_images import image, photographs, shard, tar, tree

ROOT = Path(__file__).parents[2]
IMAGENET = [f"imagenet-{split}-{i:03d}.tar" for split in ("train", "val") for i in range(3)]


def opened(path: Path | str, **data: object) -> Splits:
    return Splits.open(Recipe(name="test", data=Data(path=str(path), **data)))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three training and three validation shards in one folder."""
    return tree(tmp_path / "mixed", {name: shard(10 * i) for i, name in enumerate(IMAGENET)})


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("imagenet-train-{000..002}.tar", IMAGENET[:3]),
        ("imagenet-{train,val}-000.tar", [IMAGENET[0], IMAGENET[3]]),
        ("imagenet-train-*.tar", IMAGENET[:3]),
        ("imagenet-val-00[12].tar", IMAGENET[4:]),
        ("imagenet-*-{000..001}.tar", [*IMAGENET[:2], *IMAGENET[3:5]]),
        ("imagenet-train-000.tar::imagenet-val-00?.tar", [IMAGENET[0], *IMAGENET[3:]]),
        ("*", IMAGENET),
    ],
)
def test_braces_and_globs(pattern, found):
    assert matching("folder", IMAGENET, pattern) == found


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (
            "imagenet-train-{000..003}.tar",
            "folder/imagenet-train-003.tar: no such shard; the folder has imagenet-train-",
        ),
        ("cc3m-*.tar", "folder/cc3m-*.tar: no such shard"),
    ],
)
def test_a_pattern_that_names_too_much_is_refused(pattern, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        matching("folder", IMAGENET, pattern)


@pytest.mark.parametrize(
    ("names", "globs"),
    [
        (IMAGENET, ["imagenet-train-*.tar", "imagenet-val-*.tar"]),
        (["train.tar", "val.tar"], ["train.tar", "val.tar"]),
        (["train-0.tar", "train-1.tar", "test.tar"], ["test.tar", "train-*.tar"]),
        (["cc3m-000.tar", "cc12m-000.tar"], ["cc12m-*.tar", "cc3m-*.tar"]),
        (["00000.tar", "00001.tar"], ["*.tar"]),
        (["a.tar", "b.tar"], ["*.tar"]),
        (["shard-000000.tar", "shard-000001.tar", "new.tar"], ["shard-*.tar"]),
        (["part-00000-of-00002.tar", "part-00001-of-00002.tar"], ["part-*-of-*.tar"]),
        (["node0-shard3.tar", "node1-shard12.tar"], ["node*-shard*.tar"]),
        (["3fa9c7.tar", "0b71e2.tar"], ["*.tar"]),
    ],
)
def test_series(names, globs):
    assert list(series(names)) == globs
    if len(globs) > 1:
        with pytest.raises(UserError, match="holds shards of several sets"):
            check_one_series("folder", names)
    else:
        check_one_series("folder", names)


def test_words_of_splits_and_patterns():
    assert all(map(is_split, ("train", "Val", "TEST", "train2017", "val_images", "training_set", "test-1")))
    assert not any(map(is_split, ("valley", "trainer", "tests_of_skill", "contest", "", "cat")))
    assert cut_pattern("a/b") == ("a/b", None) and cut_pattern("a/b/x.tar") == ("a/b", "x.tar")
    assert cut_pattern("s3://b/x-{0..1}.tar") == ("s3://b", "x-{0..1}.tar") and cut_pattern("*.tar") == (
        ".",
        "*.tar",
    )


def test_a_recipe_names_shards_of_one_folder(mixed):
    with pytest.raises(UserError) as error:
        opened(mixed)
    keys = "data.train='imagenet-train-*.tar' data.test='imagenet-val-*.tar'"
    assert (
        str(error.value) == f"{mixed}/train: no such folder; the shards lie in {mixed} itself, so set {keys}"
    )
    overrides = [f"data.path={mixed}", *keys.replace("'", "").split()]
    recipe = loading.load([str(ROOT / "recipes" / "quickstart.yaml"), "data.prepare=none", *overrides])
    for _ in range(2):  # the second time from the indexes
        splits = Splits.open(recipe)
        assert [list(splits.train.shards), list(splits.held_out.shards)] == [IMAGENET[:3], IMAGENET[3:]]
        assert [splits.train.read(i) for i in (0, 11)] == [image(0), image(23)]
        assert splits.held_out.read(0) == image(30)
    braces = opened(mixed, train="imagenet-train-{000..001}.tar", test="imagenet-val-000.tar")
    assert (len(braces.train), len(braces.held_out)) == (8, 4)
    (mixed / IMAGENET[1]).unlink()
    for train in ("imagenet-train-{000..001}.tar", "imagenet-train-*.tar"):
        with pytest.raises(
            UserError, match=r"imagenet-train-001\.tar: (missing, though indexed|no such shard)"
        ):
            opened(mixed, train=train)


@pytest.mark.parametrize(
    "override", ["data.train=a-{000..127}.tar", "data.train=a-{0,1}.tar", "data.train=a-[0-9]*.tar"]
)
def test_patterns_need_no_second_quotes(override):
    recipe = loading.load([str(ROOT / "recipes" / "quickstart.yaml"), override])
    assert recipe.data.train == override.partition("=")[2]


def test_a_folder_of_several_sets_is_refused_and_may_be_named_whole(mixed):
    for shards in (lambda: opened(mixed, train="."), lambda: ShardSet.open(mixed)):
        with pytest.raises(
            UserError, match=r"several sets, imagenet-train-\*.tar \(3\), imagenet-val-\*.tar \(3\)"
        ):
            shards()
    assert len(opened(mixed, train="*.tar").train) == 24
    with pytest.raises(
        UserError, match=r"imagenet-val-000.tar: is one of 3 shards that data.train='\*.tar' and"
    ):
        opened(mixed, train="*.tar", test="imagenet-val-*.tar")


def test_an_index_of_the_whole_folder_serves_its_parts(mixed):
    for name in IMAGENET[3:]:
        (mixed / name).unlink()
    whole = ShardSet.open(mixed)
    before = sorted(path.name for path in mixed.iterdir())
    part = ShardSet.open(mixed, "imagenet-train-{001..002}.tar")
    assert [part.read(i) for i in range(8)] == [whole.read(i) for i in range(4, 12)]
    assert part.table.shard.tolist() == [0] * 4 + [1] * 4
    assert sorted(path.name for path in mixed.iterdir()) == before


def test_patterns_behind_a_url(mixed, tmp_path):
    with serve(tmp_path) as server:
        url, cache = f"{server.url}/mixed", tmp_path / "cache"
        for _ in range(2):  # the second time from the index in the cache
            shards = open_remote(url, cache, 10**9, "imagenet-val-{000..001}.tar")
            assert [shards.read(i) for i in range(8)] == [
                image(30 + 10 * k + i) for k in range(2) for i in range(4)
            ]
        assert server.seen["GET /mixed/imagenet-val-000.tar"] == 1
        with pytest.raises(UserError, match="several sets"):
            open_remote(url, cache, 10**9)
        splits = opened(url, train="imagenet-train-*.tar", test="imagenet-val-*.tar", cache_dir=str(cache))
        assert (len(splits.train), len(splits.held_out)) == (12, 12)
        splits.train.close()


@pytest.mark.parametrize("name", ["a-{000..010}.tar", "a-*.tar", "a-000.tar"])
def test_a_path_that_names_shards_says_which_keys_do(tmp_path, name):
    tree(tmp_path, {"a-000.tar": shard(0)})
    for path in (f"{tmp_path}/{name}", f"s3://bucket/{name}"):
        with pytest.raises(UserError) as error:
            opened(path)
        folder = path.removesuffix(f"/{name}")
        assert f"names shards, and must be a folder; set data.path={folder} data.train='{name}'" in str(
            error.value
        )


def test_splits_of_other_names_are_listed(tmp_path):
    tree(tmp_path, {"Train/a-0.tar": shard(0), "VAL/a-0.tar": shard(9)})
    with pytest.raises(
        UserError, match=r"/train: no such folder; .* has shards in Train, VAL: set data.train to one"
    ):
        opened(tmp_path)
    assert len(opened(tmp_path, train="Train", test="VAL").held_out) == 4


def test_images_in_place_of_shards_say_what_packs_them(tmp_path):
    with pytest.raises(UserError, match=r"train: holds no shards \(\*.tar\); images become shards by tools/"):
        opened(tree(tmp_path, photographs()))


@pytest.mark.parametrize("splits", [("train/", "val/"), ("",), ("Train/", "validation/"), ("unlabeled/",)])
def test_what_is_printed_after_packing_trains(tmp_path, capsys, splits):
    source, dest = tree(tmp_path / "src", photographs(splits)), tmp_path / "out"
    assert run_tool("make_shards", source, dest, "--workers", 0) == 0
    keys = capsys.readouterr().out.splitlines()[-1].removeprefix("to train on them: ").split()
    settings = ["data.prepare=none", "data.image_size=8", "data.workers=0", "train.batch_size=4"]
    found = Splits.open(loading.load([str(ROOT / "recipes" / "quickstart.yaml"), *keys, *settings]))
    ((batch,),) = found.train_loader(1).steps(0, 1)
    assert batch.images.shape == (4, 3, 8, 8)
    assert (found.test is None) == (len(splits) == 1)


def test_what_training_needs_of_other_destinations(tmp_path):
    place = tmp_path / "x"
    assert training_needs(place / "train", [""]) == f"data.path={place} data.train=train"
    assert training_needs(place / "val", [""]) == f"data.path={place} data.test=val"
    assert training_needs(place, ["val"]) == f"data.path={place}, which has val and still lacks train"
    packed = read([str(tree(tmp_path / "src", photographs(("",))))], Choices(), tmp_path, tmp_path, 1).open()
    list(pack_splits(packed, place, Packing(), 0))
    with pytest.raises(
        UserError, match=r"x/train: no such folder; the shards lie in .*, so set data.train=\.$"
    ):
        opened(place)


# Other tools' files and labels


@pytest.mark.parametrize(
    "foreign",
    ['{"wids_version": 1, "shardlist": []}', '{"version": 2, "shards": [{"raw_data": {}}]}', "[1, 2]", "{}"],
)
def test_another_tools_index_is_left_alone(tmp_path, foreign, caplog):
    folder = tree(tmp_path / "a", {"x-0.tar": shard(0), "x-1.tar": shard(10), "index.json": foreign.encode()})
    for _ in range(2):
        assert len(ShardSet.open(folder)) == 8
    assert (folder / "index.json").read_text() == foreign
    ours = sorted(path.name for path in folder.glob("stagewise-*"))
    assert [Path(name).suffix for name in ours] == [".json", ".npz"]
    (folder / "x-1.tar").unlink()
    with pytest.raises(
        UserError, match=rf"x-1.tar: missing, though indexed; restore it, or delete {ours[0]}"
    ):
        ShardSet.open(folder)
    with serve(tmp_path) as server:
        assert len(open_remote(f"{server.url}/a", tmp_path / "cache", 10**9)) == 4


def labeled(labels: list[int]) -> bytes:
    parts = (("png", lambda i: image(i)), ("cls", lambda i: b"%d" % labels[i]))
    return tar({f"{i}.{end}": data(i) for i in range(len(labels)) for end, data in parts})


def test_labels_that_are_identifiers_are_refused(tmp_path):
    folder = tree(tmp_path, {"train/a-0.tar": labeled([1440764, 2084071, 1440764])})
    with pytest.raises(UserError) as error:
        opened(folder)
    assert "its 2 different labels go up to 2084071, as identifiers do; tools/make_shards.py" in str(
        error.value
    )
    assert opened(folder, num_classes=2084072).num_classes == 2084072
    (folder / "train" / "classes.json").write_text(json.dumps([""] * 2084072))
    assert ShardSet.open(tree(tmp_path / "b", {"a-0.tar": labeled([3, 999])})).labels.max() == 999
    assert opened(tree(tmp_path / "c", {"train/a-0.tar": labeled([3, 999])})).num_classes == 1000


def test_why_nothing_will_be_scored(tmp_path, caplog):
    members = {
        f"{i}.{end}": data for i in range(4) for end, data in (("png", image(i)), ("json", b'{"label": 1}'))
    }
    opened(tree(tmp_path / "a", {"train/a-0.tar": tar(members), "test/a-0.tar": shard(9)}))
    assert "labels in its 4 .json are taken over by tools/make_shards.py" in caplog.text
    caplog.clear()
    opened(tree(tmp_path / "b", {"train/a-0.tar": shard(0), "test/a-0.tar": shard(9, classes=None)}))
    assert f"{tmp_path}/b/test: has no labels (.cls), so nothing will be scored" in caplog.text
    caplog.clear()
    opened(tree(tmp_path / "c", {"train/a-0.tar": shard(0), "test/a-0.tar": shard(9)}))
    assert "scored" not in caplog.text
