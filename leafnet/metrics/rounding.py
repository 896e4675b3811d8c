"""Two figures as text that says which of them is larger."""


def apart(first: float, second: float, digits: str = ".3f") -> tuple[str, str]:
    """Both as `digits` has it, with as many digits more as it takes to tell them apart.

    Args:
        first: a figure.
        second: another; where the two are equal, no digit is added.
        digits: a format with a precision, such as `.3f`.

    >>> apart(0.99996, 0.99999), apart(31.2604, 31.2599, ".4g"), apart(0.41, 0.8)
    (('0.99996', '0.99999'), ('31.2604', '31.2599'), ('0.410', '0.800'))
    """
    kind, precision = digits[-1], int(digits[1:-1])
    texts = format(first, digits), format(second, digits)
    while first != second and texts[0] == texts[1] and precision < 17:
        precision += 1
        texts = f"{first:.{precision}{kind}}", f"{second:.{precision}{kind}}"
    return texts
