"""What a word is, in every script: the one definition by which answers are counted, filtered and compared.

Texts are compared in Unicode's composed form (NFC), without regard to case, to the form of quotes (’ is ', “ is ") and
hyphens, to spaces and hyphens that nobody sees, and to the commas in 1,000. A word is a run of letters, marks and
digits; in scripts that put no space between words (Han, kana, Thai, Lao, Khmer, Burmese) each character is one.
"""

import unicodedata

import regex

_WORD = regex.compile(
    r"(?=[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])\X"
    r"|\p{N}+(?:[.,]\p{N}+)*(?![\p{L}\p{M}\p{N}])"  # 3.5 is one word
    r"|[\p{L}\p{M}\p{N}]+"
)
_WORD_OR_MARK = regex.compile(_WORD.pattern + r"|\S")
# C# is not C, 50% is not 50. Searched from the end, (?r): a run of marks takes linear time.
_SPELLINGS = dict.fromkeys("‘’‚‛ʼ", "'") | dict.fromkeys("“”„‟", '"') | dict.fromkeys("\u2010\u2011", "-")
_PLAIN = str.maketrans(_SPELLINGS | dict.fromkeys("\u00ad\u200b\u2060\ufeff", ""))  # which nobody sees
_THOUSANDS = regex.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])")
_FINAL_MARKS = regex.compile(r"(?r)[\p{Terminal_Punctuation}…‥\s]+$")


def plain(text: str) -> str:
    """Return the text as it is compared; each run of spaces is one, and none is at the ends."""
    plainer = unicodedata.normalize("NFC", text).casefold().translate(_PLAIN)
    return " ".join(_THOUSANDS.sub(lambda number: number[0].replace(",", ""), plainer).split())


def words(text: str) -> list[str]:
    """Return the words of a text as they are compared, without punctuation."""
    return _WORD.findall(plain(text))


def words_and_marks(text: str) -> list[str]:
    """Return the words of a text as they are compared, and each of its other characters but spaces."""
    return _WORD_OR_MARK.findall(plain(text))


def unmarked(text: str) -> str:
    """Return the text as it is compared, without the marks that end its last sentence, in any script."""
    return _FINAL_MARKS.sub("", plain(text))
