"""What every folder of bundled weights must keep to, and the programs that made them."""

import importlib
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent.parent / "examples" / "digits"


def training_program(name: str):
    """A training program as a module, for a fixture; it imports its twin from its own folder, as long as the fixture lasts."""
    sys.path.insert(0, str(PROGRAMS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(PROGRAMS))


def assert_small_and_anonymous(folder: Path, limit: int) -> None:
    """The files take `limit` bytes at most, are of known kinds, and name no folder of the machine that made them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= limit
    for path in files:
        assert path.suffix in {".safetensors", ".json", ".txt", ".md"}, path
        if path.suffix in {".json", ".md"}:
            text = path.read_text(encoding="utf-8")
            assert not any(word in text for word in ("/home", "/work", "/root", "/tmp", "name_or_path")), path
