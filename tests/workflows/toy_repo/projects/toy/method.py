"""The method of the toy paper."""


def square(number: int) -> int:
    """The square of a number."""
    return number * number
