"""What fonts of signs show in place of letters: `a` in Symbol is an alpha. Office programs write
Greek, operators, arrows and boxes in such fonts.
"""

from __future__ import annotations

import re

PRIVATE_USE = re.compile("[\uf020-\uf0ff]")  # see _FIRST
_FIRST, _LAST = 0xF020, 0xF0FF  # where Unicode texts hold the codes 0x20 to 0xFF of such a font

# Adobe's Symbol encoding, from 0x20 and from 0xA0 on, without the apple.
_SYMBOL_LOW = " !∀#∃%&∋()∗+,−./0123456789:;<=>?≅ΑΒΧΔΕΦΓΗΙϑΚΛΜΝ"
_SYMBOL_LOW += "ΟΠΘΡΣΤΥςΩΞΨΖ[∴]⊥_‾αβχδεφγηιϕκλμνοπθρστυϖωξψζ{|}∼"
_SYMBOL_HIGH = "€ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…⏐⎯↵ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈"
_SYMBOL_HIGH += "∉∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓◊⟨®©™∑⎛⎜⎝⎡⎢⎣⎧⎨⎩⎪ ⟩∫⌠⎮⌡⎞⎟⎠⎤⎥⎦⎫⎬⎭"
_SYMBOL = dict(zip(range(0x20, 0x7F), _SYMBOL_LOW, strict=True))
_SYMBOL |= dict(zip(range(0xA0, 0xFF), _SYMBOL_HIGH, strict=True))
del _SYMBOL[0xF0]
# Of Wingdings and its second part what stands in texts: boxes, ticks, bullets, arrows, numbers.
_WINGDINGS = {
    **{0x28: "☎", 0x2A: "✉", 0x46: "☞", 0x4A: "☺", 0x4C: "☹", 0x6C: "●", 0x6E: "■"},
    **{0x6F: "☐", 0x71: "❑", 0x72: "❒", 0x73: "⬧", 0x74: "⧫", 0x75: "◆", 0x76: "❖", 0x77: "⬥"},
    **{0x9F: "•", 0xA7: "▪", 0xA8: "☐", 0xAB: "★", 0xD8: "➢", 0xDF: "←", 0xE0: "→", 0xE1: "↑"},
    **{0xE2: "↓", 0xE7: "←", 0xE8: "→", 0xE9: "↑", 0xEA: "↓", 0xEF: "⇦", 0xF0: "⇨", 0xF3: "⬄"},
    **{0xFB: "✗", 0xFC: "✓", 0xFD: "☒", 0xFE: "☑"},
    **dict(zip(range(0x80, 0x8B), "⓪①②③④⑤⑥⑦⑧⑨⑩", strict=True)),
    **dict(zip(range(0x8B, 0x96), "⓿❶❷❸❹❺❻❼❽❾❿", strict=True)),
}
_WINGDINGS_2 = {
    **{0x4F: "✗", 0x50: "✓", 0x51: "☒", 0x52: "☑", 0x53: "☒", 0x54: "☒", 0x97: "●"},
    **{0x98: "●", 0xA2: "■", 0xA3: "☐"},
}
_FONTS = {"symbol": _SYMBOL, "wingdings": _WINGDINGS, "wingdings 2": _WINGDINGS_2}
_FONTS |= {"symbol mt": _SYMBOL, "wingdings 3": {}, "webdings": {0x61: "✓"}, "marlett": {}}
_TICKS = "☐☑☒✓✔✗✘"


def is_symbol_font(font: str) -> bool:
    return font.strip().lower() in _FONTS


def sign(font: str, code: int) -> str:
    """What a font shows for a code of 8 bits or a character of Unicode's private use; "" where it
    is not known."""
    if _FIRST <= code <= _LAST:
        code -= 0xF000
    return " " if code == 0x20 else _FONTS.get(font.strip().lower(), {}).get(code, "")


def shown(font: str, text: str) -> str:
    """A text that is set in a font. Letters of a font of signs may be held as those or, by newer
    programs, for private use; where such stand in another font nothing is known of them."""
    if is_symbol_font(font):
        return "".join(sign(font, ord(letter)) or letter for letter in text)
    return text


def tick(font: str, bullet: str) -> str:
    """The box or tick that an item of a list has for a bullet, which says something of it; "" for
    bullets that are nothing but that."""
    found = shown(font, bullet)
    return found if len(found) == 1 and found in _TICKS else ""
