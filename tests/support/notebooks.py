"""Small rows, for the notebooks and for batches."""

ENGLISH = [("Name a bird.", "A robin."), ("Name a fish.", "A pike."), ("Say hello.", "Hello!")]


def made_of(pairs, times=4, **more):
    """Rows of (instruction, output) pairs, each several times with a number so that the questions differ."""
    return [
        {"instruction": f"{question} {number}" if number else question, "output": answer, **more}
        for number in range(times)
        for question, answer in pairs
    ]
