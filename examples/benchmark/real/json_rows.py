"""A task with answers of a fixed format: a sentence about an order, a booking or a measurement, and the same as one line of JSON."""

import json
import random


_NAMES = ("Mara", "Oskar", "Lena", "Hugo", "Nadia", "Felix", "Iris", "Jonas", "Clara", "Tomas", "Vera", "Emil", "Aiko", "Samir",
          "Priya", "Diego", "Wanjiru", "Noor", "Pavel", "Sofia")  # fmt: skip
_CITIES = (
    "Lisbon",
    "Oslo",
    "Vienna",
    "Prague",
    "Dublin",
    "Athens",
    "Turin",
    "Ghent",
    "Porto",
    "Kyoto",
    "Lima",
    "Nairobi",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_COLORS = ("red", "blue", "green", "white", "black", "yellow", "grey", "brown")
_ITEMS = ("kettles", "chairs", "lamps", "notebooks", "umbrellas", "mugs", "towels", "candles", "cushions", "backpacks", "vases",
          "clocks")  # fmt: skip
_ROOMS = ("single room", "double room", "suite", "family room")
_PLACES = ("cellar", "greenhouse", "server room", "attic", "workshop", "harbour", "library", "kitchen")
_QUANTITIES = {"temperature": "°C", "humidity": "%", "noise": "dB", "air pressure": "hPa", "light": "lx"}
_FRAMES = {
    "order": (
        "{customer} orders {count} {color} {item}, to arrive on {day}.",
        "Please send {count} {item} in {color} to {customer} by {day}.",
        "On {day}, {customer} wants {count} {color} {item}.",
        "We need {count} {color} {item} for {customer}; {day} is fine.",
    ),
    "booking": (
        "{guest} books a {room} in {city} for {nights} nights from {day}.",
        "From {day}, {nights} nights in {city} for {guest}: a {room}, please.",
        "Could you reserve a {room} in {city} for {guest}? Arrival {day}, {nights} nights.",
        "{guest} will be in {city} from {day} and needs a {room} for {nights} nights.",
    ),
    "measurement": (
        "At {time} the {quantity} in the {place} was {value} {unit}.",
        "{place}, {time}: {quantity} {value} {unit}.",
        "The sensor in the {place} reads a {quantity} of {value} {unit} at {time}.",
        "We noted {value} {unit} of {quantity} in the {place} at {time}.",
    ),
}
_INSTRUCTIONS = ("Write this as JSON: {}", "{} Give me that as one line of JSON.", "As JSON, please. {}", "Turn this note into JSON: {}")  # fmt: skip


def json_row(rng: random.Random) -> dict[str, str]:
    """A prompt and its only right answer, drawn by `rng`."""
    kind = rng.choice(list(_FRAMES))
    values: dict[str, str | int | float]
    if kind == "order":
        values = dict(
            customer=rng.choice(_NAMES),
            item=rng.choice(_ITEMS),
            color=rng.choice(_COLORS),
            count=rng.randint(2, 60),
            day=rng.choice(_DAYS),
        )
    elif kind == "booking":
        values = dict(
            guest=rng.choice(_NAMES),
            city=rng.choice(_CITIES),
            room=rng.choice(_ROOMS),
            nights=rng.randint(2, 21),
            day=rng.choice(_DAYS),
        )
    else:
        quantity = rng.choice(list(_QUANTITIES))
        values = dict(
            place=rng.choice(_PLACES),
            quantity=quantity,
            value=rng.randint(20, 990) / 10,
            unit=_QUANTITIES[quantity],
            time=f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
        )
    sentence = rng.choice(_FRAMES[kind]).format(**values)
    answer = json.dumps({"type": kind, **values}, ensure_ascii=False)
    return {"prompt": rng.choice(_INSTRUCTIONS).format(sentence), "completion": answer}


def json_rows(count: int, seed: int) -> list[dict[str, str]]:
    """So many rows with different prompts; there are more than a hundred thousand."""
    rng, rows = random.Random(f"json:{seed}"), {}
    while len(rows) < count:
        row = json_row(rng)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())
