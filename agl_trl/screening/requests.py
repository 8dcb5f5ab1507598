"""What of a training row is the request, and what the answer."""

from ..data.rows import OF_TEMPLATE, SHAREGPT, Row, read_columns


def with_request(row: Row) -> Row:
    """
    A conversation that ends with the assistant as prompt and answer, which the tokens of the whole do not tell apart; any other row
    as it is.
    """
    if row.tokens is not None or row.keys() & {"chosen_ids", "input_ids"}:
        return row
    columns = read_columns(row)
    if columns.keys() != {"messages"}:
        return row
    *before, last = columns["messages"]
    if not before or SHAREGPT.get(last["role"], last["role"]) != "assistant":
        return row
    told = {column: row[column] for column in OF_TEMPLATE if column in row}
    return Row(told | {"prompt": before, "completion": [last]}, row.number)


def is_text_alone(row: Row) -> bool:
    """Whether nothing in a row tells its request from its answer."""
    if row.keys() & {"chosen_ids", "input_ids"}:
        return not row.keys() & {"chosen_ids", "labels"}
    return row.tokens is None and not read_columns(with_request(row)).keys() & {"prompt", "chosen"}
