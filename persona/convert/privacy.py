"""Personal data in texts: found for the report, masked under --redact. Nothing of it leaves the machine."""

import re
from collections import Counter

_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}")
_DIGITS = re.compile(r"(?<![\dA-Za-z.])\+?\(?\d(?:[ -]?[\d()]){6,24}[Xx]?(?![\dA-Za-z])")
_KEY = re.compile(r"\b(?:sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999
_PHONE = re.compile(
    r"(?:\+?86)?1[3-9]\d{9}|\+\d{8,15}|0\d{9,11}|400\d{7}|\(\d{3}\)\d{7}|\d{3}-\d{3}-\d{4}|\d{3} \d{3} \d{4}"
)


def redact(text: str, repairs: Counter[str]) -> str:
    """`text` with phone numbers, addresses, identity and card numbers and keys replaced by their names in brackets."""
    if "@" in text:
        text, count = _EMAIL.subn("[email]", text)
        _count(repairs, "email", count)
    if any(mark in text for mark in ("sk-", "hf_", "gh", "AKIA")):
        text, count = _KEY.subn("[key]", text)
        _count(repairs, "key", count)

    def masked(match: re.Match[str]) -> str:
        kind = _kind(match[0])
        if kind is None:
            return match[0]
        _count(repairs, kind, 1)
        return f"[{kind}]"

    return _DIGITS.sub(masked, text)


def _count(repairs: Counter[str], kind: str, count: int) -> None:
    if count:
        repairs[f"personal data masked: {kind}"] += count


def personal_data(text: str) -> Counter[str]:
    """How many pieces of personal data of each kind stand in `text`."""
    found: Counter[str] = Counter()
    redact(text, found)
    return Counter({name.rpartition(" ")[2]: count for name, count in found.items()})


def _kind(written: str) -> str | None:
    """What a run of digits is: an identity number, a bank card, a phone number, or None for a mere number."""
    digits = re.sub(r"[ ()-]", "", written)
    bare = digits.lstrip("+")
    if len(bare) == 18 and bare[:17].isdigit() and _is_identity(bare):
        return "id"
    if 13 <= len(bare) <= 19 and bare.isdigit() and bare[0] in "3456" and _luhn(bare):
        return "card"
    return "phone" if _PHONE.fullmatch(digits) or _PHONE.fullmatch(written) else None


def _is_identity(digits: str) -> bool:
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, digits, strict=False))
    return "10X98765432"[total % 11] == digits[17].upper()


def _luhn(digits: str) -> bool:
    doubled = [int(digit) * 2 for digit in digits[-2::-2]]
    return (sum(int(digit) for digit in digits[-1::-2]) + sum(n - 9 if n > 9 else n for n in doubled)) % 10 == 0
