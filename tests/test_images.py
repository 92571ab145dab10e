"""Image sets: grey levels there and back, area pooling, IDX files, folders of pictures."""

import gzip
import re
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from scoresde_cli.advice import advice
from scoresde_cli.compose import compose
from scoresde_cli.datasets.base import split_rows
from scoresde_cli.datasets.digits import Digits
from scoresde_cli.datasets.hf import HF
from scoresde_cli.datasets.idx import IDX
from scoresde_cli.datasets.image_folder import ImageFolder
from scoresde_cli.datasets.images import area_pool, unmirrored
from scoresde_cli.errors import ScoreSDEError, Unreadable
from scoresde_cli.networks.model import fit_gaussian
from scoresde_cli.rng import generator, uniform
from scoresde_cli.stored import pack_data, unpack_data
from tests.conftest import SHARED
from tests.pictures import idx_bytes, write_hf, write_idx, write_pictures
from tests.test_evaluation import config

F64 = torch.float64


def levels(data):
    return torch.cat([data.units.to_user(x) for x in data.splits.values()])


def sorted_rows(u):
    return np.unique(np.asarray(u).reshape(len(u), -1), axis=0)


@pytest.mark.parametrize("dequantise", [False, True])
def test_digits_are_bit_for_bit_what_they_were_before_the_image_sets_shared_their_code(dequantise):
    images = torch.from_numpy(load_digits().images)
    rows, _ = split_rows(images, 3)
    if dequantise:
        images = images + uniform(tuple(images.shape), generator(3, "dequantise"), F64) - 0.5
    data = Digits(dequantise, labels=True, seed=3)
    for split, index in rows.items():
        assert torch.equal(data.splits[split], ((images - 8.0) / 8.0).float().unsqueeze(1)[index])
        assert torch.equal(data.labels[split], torch.from_numpy(load_digits().target)[index])


@pytest.mark.parametrize("dequantise", [False, True])
@pytest.mark.parametrize("kind", ["idx", "grey", "colour"])
def test_levels_come_back_exactly_and_the_jacobian_is_that_of_the_way(kind, dequantise, tmp_path):
    if kind == "idx":
        data = IDX(str(write_idx(tmp_path)), dequantise=dequantise)
        file = np.frombuffer((tmp_path / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(60, 1, 6, 6)
    else:
        write_pictures(tmp_path, mode="L" if kind == "grey" else "RGB")
        data = ImageFolder(str(tmp_path), dequantise=dequantise)
        file = np.stack([np.atleast_3d(Image.open(f)).transpose(2, 0, 1) for f in sorted(tmp_path.iterdir())])
    assert data.shape == file.shape[1:]
    u = levels(data)
    if not dequantise:  # float32 of a level: exact to 1e-5 of it
        assert torch.allclose(u, u.round(), rtol=0, atol=2e-5)
    assert np.array_equal(sorted_rows(u.round()), sorted_rows(file))
    assert torch.equal(data.units.to_user(data.units.to_model(u.round())), u.round())
    assert max(x.abs().max() for x in data.splits.values()) <= 1 + dequantise / 255
    J = torch.autograd.functional.jacobian(
        lambda u: data.units.to_model(u[None])[0].flatten(), torch.zeros(data.shape, dtype=F64)
    ).flatten(1)
    assert data.units.log_det() == pytest.approx(float(torch.linalg.slogdet(J)[1]), abs=1e-9)
    assert torch.equal(data.quantum, torch.ones(len(J), dtype=F64))
    (tmp_path / "data.safetensors").write_bytes(pack_data(data, fit_gaussian(data.splits["train"], "isotropic")))
    stored, _ = unpack_data(tmp_path / "data.safetensors")
    assert torch.equal(stored.units.to_user(data.splits["test"]), data.units.to_user(data.splits["test"]))


@pytest.mark.parametrize(
    ("height", "width", "size"), [(28, 28, 14), (28, 28, 7), (28, 28, 8), (9, 5, 3), (6, 6, 6), (7, 11, 1)]
)
def test_pooling_keeps_the_mean_of_every_image(height, width, size):
    u = torch.randint(0, 256, (5, 2, height, width), generator=generator(0, "u"), dtype=torch.uint8)
    small = area_pool(u, size)
    assert small.shape == (5, 2, size, size)
    assert torch.allclose(small.mean((2, 3)), u.double().mean((2, 3)), rtol=1e-13)
    if height % size == 0 and width % size == 0:  # whole pixels: the ordinary average pooling
        step = (height // size, width // size)
        assert torch.allclose(small, torch.nn.functional.avg_pool2d(u.double(), step), rtol=1e-13)


def test_pooled_images_are_whole_levels_nearest_to_the_means_of_the_areas(tmp_path):
    data = IDX(str(write_idx(tmp_path, height=7, width=9)), size=4)
    images = np.frombuffer((tmp_path / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(60, 1, 7, 9)
    exact = area_pool(torch.from_numpy(images.copy()), 4)
    assert np.array_equal(sorted_rows(levels(data).round()), sorted_rows(exact.round()))
    # Errors of rounding are uniform on a level: their mean over N = 960 pixels is below 5 standard errors sqrt(1 / 12 N).
    assert abs(float(levels(data).mean() - exact.mean())) < 5 / np.sqrt(12 * 960)


def test_a_folder_of_idx_files_is_all_its_images_with_the_labels_beside_them(tmp_path):
    write_idx(tmp_path, "train", 60)
    write_idx(tmp_path, "t10k", 40, seed=1, pack=True)
    write_idx(tmp_path, "train", 60, pack=True)  # the same again, packed: not read twice
    both = IDX(str(tmp_path), labels=True)
    assert both.facts["rows"] == 100
    assert both.classes == list("0123456789")
    one = IDX(str(tmp_path / "t10k-images-idx3-ubyte.gz"), labels=True)
    first = np.frombuffer(gzip.decompress((tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    for split, x in one.splits.items():  # an image and its label go together
        for row, label in zip(one.units.to_user(x).round(), one.labels[split], strict=True):
            (i,) = np.flatnonzero((first.reshape(40, 36) == row.flatten().numpy()).all(1))
            assert label == i % 10
    some = IDX(str(tmp_path), n=50)
    assert sum(map(len, some.splits.values())) == 50
    chosen = {tuple(u) for u in sorted_rows(levels(some).round()).tolist()}
    assert chosen < {tuple(u) for u in sorted_rows(levels(both).round()).tolist()}
    assert chosen != {tuple(u) for u in sorted_rows(levels(IDX(str(tmp_path), n=50, seed=1)).round()).tolist()}


def with_idx(folder, data, name="x-images-idx3-ubyte"):
    (folder / name).write_bytes(data)
    return folder / name


GOOD = idx_bytes(np.random.default_rng(0).integers(0, 256, (30, 4, 4), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "first bytes are none"),
        (b"\x89PNG\r\n\x1a\n" * 9, "first bytes are 137 80 78 71; expected an IDX file of images: first bytes 0 0 8 3"),
        (b"\0\0\x0d\3" + GOOD[4:], "0 0 13 3"),
        (idx_bytes(np.zeros(30, np.uint8)), "a file of labels; expected an IDX file of images"),
        (GOOD[:-1], "30 x 4 x 4 values, after it stand 479 bytes"),
        (GOOD + b"1", "481 bytes"),
        (GOOD[:9], "cut or damaged"),
        (struct.pack(">I3I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "after it stand 0 bytes"),
        (idx_bytes(np.zeros((0, 4, 4), np.uint8)), "0 x 4 x 4"),
        (gzip.compress(GOOD)[:-20], "not readable as .gz"),
        (gzip.compress(GOOD)[:40] + b"??" + gzip.compress(GOOD)[42:], "not readable as .gz"),
        (idx_bytes(np.arange(160, dtype=np.uint8).reshape(10, 4, 4)), r"10 row\(s\) of data"),
        (idx_bytes(np.zeros((30, 4, 4), np.uint8)), "so many rows are equal"),
    ],
)
def test_files_that_are_no_idx_files_of_images_are_refused(data, says, tmp_path):
    with pytest.raises(Unreadable, match=says):
        IDX(str(with_idx(tmp_path, data)))


def test_settings_that_do_not_fit_the_idx_files_are_refused(tmp_path):
    write_idx(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    with pytest.raises(ScoreSDEError, match=r"data.size=9: the images are 6 x 6.*at most 6"):
        IDX(str(file), size=9)
    with pytest.raises(ScoreSDEError, match="holds 60 images"):
        IDX(str(file), n=61)
    with pytest.raises(ScoreSDEError, match="does not exist; did you mean 'train-images-idx3-ubyte'"):
        IDX(f"{file}.gz")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(59, np.uint8)))
    with pytest.raises(Unreadable, match="60 images, and 59 labels"):
        IDX(str(file), labels=True)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ScoreSDEError, match=r"expected train-labels-idx1-ubyte or train-labels-idx1-ubyte\.gz"):
        IDX(str(file), labels=True)
    with pytest.raises(ScoreSDEError, match="not named as MNIST's files are"):
        IDX(str(with_idx(tmp_path, GOOD, "mine.idx")), labels=True)
    write_idx(tmp_path, "t10k", height=5)
    with pytest.raises(
        Unreadable, match=r"unlike sizes \(t10k-images-idx3-ubyte 5 x 6, train-images-idx3-ubyte 6 x 6\)"
    ):
        IDX(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Unreadable, match="no IDX files of images"):
        IDX(str(tmp_path / "empty"))


def test_mnist_is_read_pooled_and_labelled():
    folder = SHARED / "mnist"
    if not folder.exists():
        pytest.skip(f"MNIST's files are not at {folder}")
    whole, small = (IDX(str(folder), size=size, labels=True, n=2000) for size in (None, 8))
    assert whole.shape == (1, 28, 28)
    assert small.shape == (1, 8, 8)
    assert whole.classes == list("0123456789")
    counts = torch.cat(list(whole.labels.values())).bincount()
    assert counts.min() > 120  # about 200 each
    # The choice of images is the same; rounding shifts a mean by less than the 5 standard errors above (background stays 0).
    assert abs(float(levels(whole).mean() - levels(small).mean())) < 5 / np.sqrt(12 * 64 * 2000)
    assert float(levels(whole).mean()) == pytest.approx(33.8, abs=1.5)  # MNIST's test images: 33.79


MIXED = [(8, 8), (12, 8), (8, 12), (20, 16), (9, 9)]


@pytest.fixture
def mixed(tmp_path):
    """30 PNGs of 5 sizes, in two sub-folders, a broken and a cut one, and files that are no pictures."""
    write_pictures(tmp_path, 30, MIXED, names=["cats", "dogs"])
    (tmp_path / "cats" / "broken.png").write_bytes(b"not a picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "dogs" / "cut.PNG", "PNG")
    (tmp_path / "dogs" / "cut.PNG").write_bytes((tmp_path / "dogs" / "cut.PNG").read_bytes()[:900])
    (tmp_path / "cats" / "._000.png").write_bytes(b"a file that an Apple machine leaves")
    (tmp_path / "notes.txt").write_text("mine")
    return str(tmp_path)


def test_a_broken_file_is_named_with_the_option_that_leaves_it_out(mixed):
    with pytest.raises(
        Unreadable,
        match=r"cats/broken\.png is not readable.*no PNG or JPEG \(and 1 more of 32\); .*data\.skip_broken=true$",
    ):
        ImageFolder(mixed)
    with pytest.raises(Unreadable, match=r"of 5 sizes \(6 of 8 x 8, 6 of 8 x 12, .*, 6 of others\).*data\.fit=crop"):
        ImageFolder(mixed, skip_broken=True)
    data = ImageFolder(mixed, size=8, fit="crop", skip_broken=True, labels=True)
    assert data.facts["rows"] == 30
    assert data.facts["broken"] == 2
    assert data.classes == ["cats", "dogs"]
    assert torch.cat(list(data.labels.values())).bincount().tolist() == [15, 15]
    assert data.shape == (3, 8, 8)


def test_images_of_the_right_size_are_left_alone_and_others_cropped_or_resized(tmp_path):
    ramp = np.tile(
        np.linspace(0, 255, 24).round().astype(np.uint8), (12, 1)
    )  # dark left, light right; 24 wide, 12 high
    for i in range(20):
        Image.fromarray(np.full((12, 24), 10 * i, np.uint8) if i else ramp).save(tmp_path / f"{i}.png")
    cut, squeezed = (levels(ImageFolder(str(tmp_path), size=6, fit=fit)).round() for fit in ("crop", "resize"))
    spread = [float((u.amax((1, 2, 3)) - u.amin((1, 2, 3))).max()) for u in (cut, squeezed)]
    assert spread[0] < 0.55 * 255 < 0.8 * 255 < spread[1]  # the middle half of the ramp, or all of it
    whole = ImageFolder(str(tmp_path))
    assert whole.shape == (1, 12, 24)
    with pytest.raises(ScoreSDEError, match=r"20 of 24 x 12; bring them to 12 x 12 with data\.fit=crop"):
        ImageFolder(str(tmp_path), size=12)
    with pytest.raises(ScoreSDEError, match="to which size"):
        ImageFolder(str(tmp_path), fit="crop")


def test_every_mode_of_a_png_or_jpeg_is_brought_to_eight_bits(tmp_path):
    write_pictures(tmp_path, 20, mode="L")
    sixteen = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)
    Image.fromarray(sixteen).save(tmp_path / "a16.png")
    Image.fromarray(np.full((8, 8, 2), [9, 0], np.uint8)).save(tmp_path / "clear.png")  # grey 9, wholly transparent
    data = ImageFolder(str(tmp_path))
    assert data.shape == (1, 8, 8)
    rows = sorted_rows(levels(data).round()).tolist()
    assert (sixteen // 257).flatten().tolist() in rows
    assert [255.0] * 64 in rows
    for mode, name in (("P", "p.png"), ("CMYK", "c.jpg"), ("RGBA", "r.png"), ("1", "one.png")):
        Image.new(mode, (8, 8)).save(tmp_path / name)
    assert ImageFolder(str(tmp_path)).shape == (3, 8, 8)
    assert ImageFolder(str(tmp_path), channels=1).shape == (1, 8, 8)


def test_photographs_are_turned_as_their_exif_data_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for i in range(20):
        Image.effect_noise((8, 16), 60 + i).save(tmp_path / f"{i}.jpg", exif=exif)
    assert ImageFolder(str(tmp_path)).shape == (1, 8, 16)


def test_flips_double_the_training_split_alone_and_no_mirror_image_stands_elsewhere(tmp_path):
    write_pictures(tmp_path, 30, names=["a", "b"])
    for file in list(tmp_path.rglob("*.png"))[:10]:
        mirrored = Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored.save(file.with_name(f"m{file.name}"))
    plain, data = (ImageFolder(str(tmp_path), labels=True, flips=flips) for flips in (False, True))
    half = len(data.splits["train"]) // 2
    assert abs(half - len(plain.splits["train"])) <= 1
    assert torch.equal(data.splits["train"][half:], data.splits["train"][:half].flip(-1))
    assert len(data.labels["train"]) == 2 * half
    train = {tuple(x) for x in data.splits["train"].flatten(1).tolist()}
    for split in ("valid", "test"):
        assert not train & {tuple(x) for x in data.splits[split].flatten(1).tolist()}
    assert len(data.everything()) == 40  # for the floors: each image once


def test_an_image_and_its_mirror_image_have_one_representative():
    u = torch.randint(0, 3, (50, 2, 3, 3), generator=generator(0, "u"), dtype=torch.uint8)
    assert torch.equal(unmirrored(u), unmirrored(u.flip(-1)))
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(unmirrored(u), u, strict=True))


def test_folders_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(Unreadable, match=r"no PNG or JPEG files in this folder \(it is empty\)"):
        ImageFolder(str(tmp_path))
    (tmp_path / "a.gif").touch()
    with pytest.raises(Unreadable, match=r"only \.gif"):
        ImageFolder(str(tmp_path))
    with pytest.raises(ScoreSDEError, match="expected a folder"):
        ImageFolder(str(tmp_path / "a.gif"))
    with pytest.raises(ScoreSDEError, match="does not exist"):
        ImageFolder(str(tmp_path / "nowhere"))
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    with pytest.raises(Unreadable, match="and 19 more of 20"):
        ImageFolder(str(tmp_path))
    with pytest.raises(Unreadable, match="none of the 20 files"):
        ImageFolder(str(tmp_path), skip_broken=True)
    with pytest.raises(ScoreSDEError, match="20 of 20 images stand in no sub-folder"):
        ImageFolder(str(tmp_path), labels=True)
    big = tmp_path / "big"
    big.mkdir()
    for i in range(20):
        Image.new("L", (300, 300), i).save(big / f"{i}.png")
    with pytest.raises(ScoreSDEError, match="300 x 300; say the size to model"):
        ImageFolder(str(big))
    with pytest.raises(Unreadable, match="all images have the label 'big'"):
        ImageFolder(str(write_pictures(tmp_path / "one", 20, names=["big"])), labels=True)


def test_a_set_by_name_is_its_images_with_the_names_of_its_classes(tmp_path):
    place = write_hf(tmp_path)
    import datasets

    rows = datasets.load_from_disk(str(place))["train"]
    file = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in rows["img"][:]])
    data = HF(str(place), labels=True)
    assert data.shape == (3, 8, 8)
    assert data.classes == ["cat", "dog", "owl"]
    found = {u.round().to(torch.uint8).numpy().tobytes(): int(k) for s in data.splits
             for u, k in zip(data.units.to_user(data.splits[s]), data.labels[s], strict=True)}  # fmt: skip
    assert found == {image.tobytes(): kind for image, kind in zip(file, rows["kind"][:], strict=True)}
    assert HF(str(place)).labels is None
    assert HF(str(place)).known is not None
    assert HF(str(place), part="test", channels=1, size=4, fit="resize").shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"part": "tset"}, "did you mean 'test'"), ({"image": "kind"}, "no column of images"),
        ({"label": "knd"}, "did you mean 'kind'"), ({"n": 100}, "holds 60 images"), ({"fit": "crop"}, "to which size"),
        ({"size": 4}, "data.fit=crop"),
    ],
)  # fmt: skip
def test_what_a_set_by_name_lacks_is_said(settings, says, tmp_path):
    with pytest.raises(ScoreSDEError, match=re.escape(says)):
        HF(str(write_hf(tmp_path)), **settings)


def test_without_package_network_or_set_there_is_one_line(monkeypatch):
    def away(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe Hub")

    stand_in = SimpleNamespace(
        disable_progress_bars=lambda: None, DownloadConfig=lambda **keys: None, load_dataset=away, DatasetDict=dict
    )
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setattr("scoresde_cli.datasets.hf.reachable", lambda: True)
    with pytest.raises(ScoreSDEError, match=r"data.path=mnits: not to be had .*did you mean 'mnist'") as found:
        HF("mnits")
    assert "\n" not in str(found.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ScoreSDEError, match=r"pip install 'scoresde\[images\]'"):
        HF("mnist")


@pytest.mark.parametrize(("levels", "padded"), [(4, None), (5, "16 x 16")])
def test_levels_below_one_pixel_are_pointed_out(levels, padded):
    changes = {"network": "unet", "network__channels": 4, "network__multipliers": str([1] * levels).replace(" ", "")}
    said = [line for line in advice(compose(config(data="digits", **changes)), [])[1] if "images are padded to" in line]
    assert [padded in line for line in said] == [True] * (padded is not None)
