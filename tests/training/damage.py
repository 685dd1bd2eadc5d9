"""Ways to damage the files of a checkpoint, one at a time, each undone before the next."""

import shutil


def damages(folder, flips=8):
    """Damage `folder` and yield a word on how; every file is emptied, cut short, removed, and has bits flipped."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        places = {len(content) * i // flips for i in range(flips)} | {len(content) - 1}
        for what, damaged in [
            ("emptied", b""),
            ("cut in half", content[: len(content) // 2]),
            ("a byte short", content[:-1]),
            ("a byte longer", content + b"\n"),
            *((f"bit {place % 8} of byte {place} flipped", _flipped(content, place)) for place in sorted(places)),
        ]:
            path.write_bytes(damaged)
            yield f"{path.name} {what}"
        path.unlink()
        yield f"{path.name} removed"
        path.mkdir()
        yield f"{path.name} a folder"
        shutil.rmtree(path)
        path.write_bytes(content)
    stray = folder / "shard-00009-model-00001-of-00001.safetensors"
    stray.write_bytes(b"stray")
    yield f"{stray.name} added"
    stray.unlink()


def _flipped(content, place):
    flipped = bytearray(content)
    flipped[place] ^= 1 << place % 8
    return bytes(flipped)
