"""Python's UTF-8 mode, for commands in an ASCII-only locale."""

from __future__ import annotations

import codecs
import locale
import os
import sys


def use_utf8() -> None:
    """Restarts the process in UTF-8 mode if its locale is ASCII, as Python does by default.

    Libraries, including torch, open their files in the locale's encoding and fail at the first other character.
    """
    is_ascii = codecs.lookup(locale.getpreferredencoding(False)).name == "ascii"
    if is_ascii and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
