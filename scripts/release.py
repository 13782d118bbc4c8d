"""Build gputune's wheel and source package, check them, and install and use each of them.

    python scripts/release.py [--out dist] [--no-install]

Both are built twice and must have the same bytes. The wheel has the compiled code of every level
and no tests. Its name has the oldest glibc that its libraries need (PEP 600). Each package is
installed into a separate environment without a compiler on the path. There the wheel runs the
README's first block and the demo's search in compiled code. The source package has no compiled code
there, and must report it.
"""

import argparse
import gzip
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 400_000  # bytes of all libraries
TOOLS = ("build", "twine", "wheel")


def main() -> int:
    """Build, check, install and use both packages; return 0, or raise an error if a check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the packages")
    parser.add_argument(
        "--no-install", action="store_true", help="build and check, without the two environments"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tools = environment(Path(folder, "tools"))
        run(tools, "-m", "pip", "install", "-q", *TOOLS)
        first, again = (build(tools, Path(folder, name)) for name in ("first", "again"))
        for one, other in zip(first, again, strict=True):
            require(
                one.read_bytes() == other.read_bytes(),
                f"{one.name} is not the same bytes when it is built again",
            )
        wheel, source = first
        check(wheel)
        wheel = renamed(tools, wheel)
        run(tools, "-m", "twine", "check", "--strict", wheel, source)
        options.out.mkdir(parents=True, exist_ok=True)
        packages = [path.replace(options.out / path.name) for path in (wheel, source)]
        for package in packages:
            print(package)
        if not options.no_install:
            use(packages[0], Path(folder, "wheel"), compiled=True)
            use(packages[1], Path(folder, "source"), compiled=False)
    return 0


def environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def run(python: Path, *words: "str | Path", **options: object) -> str:
    """Run Python and return its output of both streams; if it fails, raise an error with this
    output.
    """
    done = subprocess.run(
        [python, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )  # type: ignore[call-overload]
    require(done.returncode == 0, f"{' '.join(map(str, words))} failed:\n{done.stdout}")
    return done.stdout


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"release: {otherwise}")


def build(tools: Path, out: Path) -> tuple[Path, Path]:
    """Build both packages from the files that git tracks; return wheel and source package.

    The wheel is built from the source package.
    """
    clone = out / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    moment = subprocess.check_output(
        ["git", "-C", clone, "log", "-1", "--format=%ct"], text=True
    ).strip()
    run(tools, "-m", "build", "-o", out, clone, env={**os.environ, "SOURCE_DATE_EPOCH": moment})
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    date(source, int(moment))
    return wheel, source


def date(source: Path, moment: int) -> None:
    """Give every file in a source package the same date; setuptools keeps the dates on the disk."""
    with tarfile.open(source) as old:
        members = [
            (member, old.extractfile(member) if member.isfile() else None)
            for member in old.getmembers()
        ]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as new:
            for member, content in sorted(members, key=lambda pair: pair[0].name):
                member.mtime = moment
                member.uid = 0
                member.gid = 0
                member.uname = ""
                member.gname = ""
                member.pax_headers = {}
                new.addfile(member, content)
    source.write_bytes(gzip.compress(buffer.getvalue(), mtime=moment))


def check(wheel: Path) -> None:
    """Check the contents of a wheel: libraries of two types and three levels, their size, and no
    tests.
    """
    with zipfile.ZipFile(wheel) as content:
        sizes = {name: content.getinfo(name).file_size for name in content.namelist()}
    libraries = {name: size for name, size in sizes.items() if name.endswith(".so")}
    require(
        len(libraries) == 6,
        f"{wheel.name} has {len(libraries)} of 6 libraries; is there a C compiler?",
    )
    require(
        sum(libraries.values()) <= LARGEST,
        f"the libraries take {sum(libraries.values()):,} of {LARGEST:,} bytes",
    )
    foreign = [
        name
        for name in sizes
        if not re.match(r"gputune/|gputune-[^/]+\.dist-info/", name) or "/test" in name
    ]
    require(not foreign, f"{wheel.name} holds {foreign}")


def renamed(tools: Path, wheel: Path) -> Path:
    """Rename a Linux wheel after the newest glibc version that its libraries need."""
    needed = [(2, 17)]
    with zipfile.ZipFile(wheel) as content:
        for name in content.namelist():
            if name.endswith(".so"):
                found = re.findall(rb"GLIBC_(\d+)\.(\d+)", content.read(name))
                needed += [(int(major), int(minor)) for major, minor in found]
    if "-linux_" not in wheel.name:
        return wheel
    tag = wheel.name.rpartition("-")[2].removesuffix(".whl").removeprefix("linux_")
    platform = "manylinux_{}_{}_{}".format(*max(needed), tag)
    name = run(tools, "-m", "wheel", "tags", "--remove", "--platform-tag", platform, wheel).split()[
        -1
    ]
    return wheel.with_name(name)


def use(package: Path, folder: Path, *, compiled: bool) -> None:
    """Install a package without a compiler; run the README's first block and the demo."""
    python = environment(folder)
    bare = {**os.environ, "PATH": str(python.parent), "CC": "none"}
    run(python, "-m", "pip", "install", "-q", package, env=bare)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code is not None
    print(run(python, "-c", code[1], env=bare, cwd=folder))
    words = "tune sklearn:digits --trials 8 --epochs 5".split()
    out = run(python.parent / "gputune", *words, env=bare, cwd=folder)
    require(
        ("has no compiled code" in out) != compiled,
        f"{package.name}: not the code that was to be there:\n{out}",
    )
    print(out)


if __name__ == "__main__":
    sys.exit(main())
