"""Make pydoc.jsonl: what the Python standard library says about its own functions and classes, asked and answered.

    python search_spaces/data/make_pydoc.py > search_spaces/data/pydoc.jsonl

The file in the repository was made with CPython 3.11; another version has other docstrings. README.md has the licence.
"""

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from types import ModuleType

SHORTEST, LONGEST = 40, 600

MODULES = """
abc argparse array ast asyncio atexit base64 binascii bisect builtins bz2 calendar cmath cmd code codecs
collections collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg
cProfile csv ctypes ctypes.util dataclasses datetime decimal difflib dis doctest email email.charset email.encoders
email.generator email.header email.message email.parser email.policy email.utils enum errno faulthandler filecmp
fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html
html.parser http http.client http.cookiejar http.cookies http.server imaplib importlib importlib.machinery
importlib.metadata importlib.resources importlib.util inspect io ipaddress itertools json keyword linecache locale
logging logging.config logging.handlers lzma mailbox math mimetypes mmap multiprocessing multiprocessing.connection
multiprocessing.shared_memory netrc numbers operator optparse os os.path pathlib pdb pickle pkgutil platform
plistlib poplib pprint pstats queue quopri random re reprlib runpy sched secrets select selectors shelve shlex
shutil signal smtplib socket socketserver sqlite3 ssl stat statistics string struct subprocess sys sysconfig
tarfile tempfile textwrap threading time timeit token tokenize trace traceback tracemalloc types typing unicodedata
unittest unittest.mock urllib.error urllib.parse urllib.request urllib.response urllib.robotparser uuid venv
warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils
zipapp zipfile zlib zoneinfo
""".split()  # noqa: SIM905


def questions() -> Iterator[tuple[str, str]]:
    """Yield (question, docstring) of every public function and class."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, thing in members(module):
            if not belongs(thing, module_name):
                continue
            path = name if module_name == "builtins" else f"{module_name}.{name}"
            if inspect.isclass(thing):
                yield f"What is {path} in Python?", documentation(thing)
            else:
                yield f"What does {path} do in Python?", documentation(thing)


def members(module: ModuleType) -> list[tuple[str, object]]:
    """Public functions and classes under the name they were given, in order; aliases are left out."""
    return sorted(
        (name, thing)
        for name, thing in vars(module).items()
        if callable(thing) and name == getattr(thing, "__name__", None) and not name.startswith("_")
    )


def belongs(thing: object, module_name: str) -> bool:
    """Whether the thing is defined in this module, or in the C half or the package behind it."""
    home = getattr(thing, "__module__", None) or ""
    parts = {part.lstrip("_") for part in home.split(".")}
    return home == module_name or module_name.split(".")[0] in parts or (module_name == "os" and home == "posix")


def documentation(thing: object) -> str:
    """The thing's own docstring, cleaned, or nothing."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def is_prose(text: str) -> bool:
    """Neither too short nor too long, and more than a signature; nothing that only this machine has."""
    first = text.split("\n", 1)[0]
    starts_with_signature = re.match(r"[\w.]+\(.*\)|[\w.]+\(", first) is not None
    return (
        SHORTEST <= len(text) <= LONGEST
        and not starts_with_signature
        and text[0].isupper()
        and not re.search(r" at 0x|/home/|/root/|/Users/|>>>", text)
        and sys.prefix not in text
    )


def main() -> None:
    """Print one JSON object per line, sorted by question, every answer once."""
    rows: dict[str, str] = {}
    for question, text in sorted(questions()):
        if is_prose(text) and text not in rows.values():
            rows[question] = text
    for question, text in rows.items():
        row = {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": text}],
        }
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
