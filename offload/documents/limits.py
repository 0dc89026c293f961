"""How much is read of a document. Files come from anywhere: each of these ends in a sentence, and
none of them in a machine that swaps.
"""

from __future__ import annotations

MAX_BYTES = 256 * 2**20  # of the file; some 60 million tokens of text, beyond any model's context
MAX_TEXT_CHARS = 64 * 2**20  # of text found in it
MAX_PAGES = 50_000
MAX_SECTIONS = 100_000  # headings whose places are remembered

# Archives (EPUB, Office). Books and reports unpack to two to ten times their size; the classic
# bombs to a thousand times and more.
MAX_MEMBERS = 20_000
MAX_UNPACKED_BYTES = 512 * 2**20
MAX_RATIO = 100
RATIO_FREE_BYTES = 16 * 2**20  # below this any ratio is harmless: a page of blanks has a high one

# The process that parses: what it may take beyond the file, and how long it may say nothing.
PARSER_MEMORY_BYTES = 2 * 2**30
SILENCE_S = 120.0
