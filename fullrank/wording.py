"""How errors of other libraries are told."""


def words_of(error: BaseException) -> str:
    """What an error says, or its type where it says nothing, as those of a timeout do."""
    return str(error) or type(error).__name__
