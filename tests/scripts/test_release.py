"""scripts/release.py: what it refuses, what it makes the same, how it names a wheel; all of it where there is time."""

import gzip
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/release.py"
LIBRARIES = {f"gputune/native/_{kind}{level}.abi3.so": 1000 for kind in ("float", "double") for level in (1, 3, 4)}


def make_wheel(folder, **files):
    path = folder / "gputune-1-cp311-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as content:
        for name, size in {"gputune/__init__.py": 1, **files}.items():
            content.writestr(name, b"x" * size)
    return path


@pytest.mark.parametrize(
    "files, says",
    [
        ({}, "has 0 of 6 libraries; is there a C compiler?"),
        ({**LIBRARIES, "gputune/native/_float4.abi3.so": 400_000}, "take 405,000 of 400,000 bytes"),
        ({**LIBRARIES, "tests/test_laws.py": 1}, "holds .*tests/test_laws.py"),
        ({**LIBRARIES, "gputune/tests/test_laws.py": 1}, "holds .*gputune/tests/test_laws.py"),
    ],
)
def test_a_wheel_that_is_not_as_it_must_be_is_refused(script, tmp_path, files, says):
    with pytest.raises(SystemExit, match=says):
        script("release").check(make_wheel(tmp_path, **files))
    script("release").check(make_wheel(tmp_path, **LIBRARIES))


def test_a_source_package_of_another_hour_is_the_same_bytes(script, tmp_path):
    packed = []
    for moment in (1, 2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in ("b", "a")[:: 3 - 2 * moment]:
                member = tarfile.TarInfo(name)
                member.size, member.mtime, member.uid, member.uname = 3, moment, moment, str(moment)
                tar.addfile(member, io.BytesIO(b"abc"))
        path = tmp_path / "source.tar.gz"
        path.write_bytes(gzip.compress(buffer.getvalue(), mtime=moment))
        script("release").date(path, 1_700_000_000)
        packed.append(path.read_bytes())
    assert packed[0] == packed[1]
    with tarfile.open(path) as tar:
        assert [(m.name, m.mtime, tar.extractfile(m).read()) for m in tar] == [(n, 1.7e9, b"abc") for n in "ab"]


def test_a_wheel_is_named_after_the_glibc_that_it_needs(script, tmp_path, monkeypatch):
    release, asked = script("release"), []
    monkeypatch.setattr(release, "run", lambda *words: asked.append(words) or "new.whl")
    wheel = make_wheel(tmp_path)
    with zipfile.ZipFile(wheel, "a") as content:
        content.writestr("gputune/native/_float1.abi3.so", b"..GLIBC_2.9..GLIBC_2.29..GLIBC_2.2.5")
    assert release.renamed("python", wheel) == tmp_path / "new.whl"
    assert asked[0][-2:] == ("manylinux_2_29_x86_64", wheel)


@pytest.mark.long
def test_the_packages_are_built_installed_and_used(tmp_path):
    words = [sys.executable, SCRIPT, "--out", tmp_path]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    names = {path.name.split("-")[0] + path.suffix for path in tmp_path.iterdir()}
    assert names == {"gputune.whl", "gputune.gz"} and ran.stdout.count("Held-out accuracy") == 2
