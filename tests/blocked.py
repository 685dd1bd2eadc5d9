"""Code for a process of its own in which some packages cannot be imported."""


def block(packages):
    """Code that hides `packages`: not found, rather than an error from the finder, since some ask whether one is there,
    and may."""
    return f"""
import sys
from importlib.machinery import PathFinder

class AllowedOnly(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {packages!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [AllowedOnly if finder is PathFinder else finder for finder in sys.meta_path]
"""
