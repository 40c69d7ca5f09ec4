"""Write data/facts.json, the data set that sft trains on when you bring none of your own.

    python data/make_facts.py            # write the file
    python data/make_facts.py --check    # exit 1 if the file on disk is not what this would write

About 500 facts (capitals, elements, plurals, ...), each asked in eight phrasings. Of the eight
questions about a fact one goes to `test`, for every second fact one goes to `val`, and the others
go to `train`. So a test question is never seen in training, but its fact is (in other words), and
so is its phrasing (about other things). A model that has only memorised strings fails the test; one
that has learnt what the words ask for passes it, and a tiny model learns that in a minute on a CPU.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SEED = 0
OUT = Path(__file__).with_name("facts.json")

Pair = dict[str, str]  # {"Question": ..., "Answer": ...}


@dataclass(frozen=True)
class Relation:
    """Facts of one kind: `rows` maps the thing asked about, `{x}` in the phrasings, to the answer.

    The phrasings give `{x}` word for word with a space or punctuation around it, so that a
    byte-level tokenizer cuts it into the same ids in every question.
    """

    rows: dict[str, str]
    phrasings: tuple[str, ...]


# Country, capital, continent. The continent is "" where the answer depends on whom you ask
# (countries on two continents, and Oceania); countries whose capital does are left out.
COUNTRIES = """
    France, Paris, Europe; Germany, Berlin, Europe; Italy, Rome, Europe; Spain, Madrid, Europe;
    Portugal, Lisbon, Europe; Austria, Vienna, Europe; Belgium, Brussels, Europe;
    Denmark, Copenhagen, Europe; Finland, Helsinki, Europe; Norway, Oslo, Europe;
    Sweden, Stockholm, Europe; Poland, Warsaw, Europe; Hungary, Budapest, Europe;
    Greece, Athens, Europe; Ireland, Dublin, Europe; Romania, Bucharest, Europe;
    Bulgaria, Sofia, Europe; Croatia, Zagreb, Europe; Iceland, Reykjavik, Europe;
    Ukraine, Kyiv, Europe; Serbia, Belgrade, Europe; Estonia, Tallinn, Europe;
    Latvia, Riga, Europe; Lithuania, Vilnius, Europe;
    Japan, Tokyo, Asia; China, Beijing, Asia; India, New Delhi, Asia; Thailand, Bangkok, Asia;
    Vietnam, Hanoi, Asia; Nepal, Kathmandu, Asia; Mongolia, Ulaanbaatar, Asia;
    Pakistan, Islamabad, Asia; Iran, Tehran, Asia; Iraq, Baghdad, Asia; Syria, Damascus, Asia;
    Lebanon, Beirut, Asia; Jordan, Amman, Asia; Qatar, Doha, Asia; South Korea, Seoul, Asia;
    Saudi Arabia, Riyadh, Asia; Laos, Vientiane, Asia; Bangladesh, Dhaka, Asia;
    Kenya, Nairobi, Africa; Ghana, Accra, Africa; Senegal, Dakar, Africa; Morocco, Rabat, Africa;
    Tunisia, Tunis, Africa; Algeria, Algiers, Africa; Ethiopia, Addis Ababa, Africa;
    Sudan, Khartoum, Africa; Uganda, Kampala, Africa; Rwanda, Kigali, Africa;
    Zambia, Lusaka, Africa; Zimbabwe, Harare, Africa; Angola, Luanda, Africa; Mali, Bamako, Africa;
    Somalia, Mogadishu, Africa; Libya, Tripoli, Africa; Namibia, Windhoek, Africa;
    Canada, Ottawa, North America; Mexico, Mexico City, North America;
    Cuba, Havana, North America; Jamaica, Kingston, North America;
    Haiti, Port-au-Prince, North America; Honduras, Tegucigalpa, North America;
    Nicaragua, Managua, North America;
    Argentina, Buenos Aires, South America; Brazil, Brasilia, South America;
    Chile, Santiago, South America; Peru, Lima, South America; Colombia, Bogota, South America;
    Venezuela, Caracas, South America; Ecuador, Quito, South America;
    Uruguay, Montevideo, South America; Paraguay, Asuncion, South America;
    Egypt, Cairo, ; Russia, Moscow, ; Turkey, Ankara, ; Australia, Canberra, ;
    New Zealand, Wellington, ; Fiji, Suva,
"""

# Element, symbol, atomic number.
ELEMENTS = """
    hydrogen, H, 1; helium, He, 2; lithium, Li, 3; carbon, C, 6; nitrogen, N, 7; oxygen, O, 8;
    fluorine, F, 9; neon, Ne, 10; sodium, Na, 11; magnesium, Mg, 12; silicon, Si, 14;
    phosphorus, P, 15; chlorine, Cl, 17; argon, Ar, 18; potassium, K, 19; calcium, Ca, 20;
    titanium, Ti, 22; iron, Fe, 26; nickel, Ni, 28; copper, Cu, 29; zinc, Zn, 30; silver, Ag, 47;
    tin, Sn, 50; iodine, I, 53; gold, Au, 79; mercury, Hg, 80; lead, Pb, 82; uranium, U, 92
"""

# The spelling alphabet of ICAO and NATO; "Alfa" and "Juliett" are spelt so in the standard.
CODE_WORDS = """
    Alfa; Bravo; Charlie; Delta; Echo; Foxtrot; Golf; Hotel; India; Juliett; Kilo; Lima; Mike;
    November; Oscar; Papa; Quebec; Romeo; Sierra; Tango; Uniform; Victor; Whiskey; X-ray; Yankee;
    Zulu
"""

MONTHS = """
    January; February; March; April; May; June; July; August; September; October; November; December
"""

# Only words with one usual opposite: "old" (new, young) or "right" (left, wrong) have two.
OPPOSITES = """
    hot, cold; big, small; fast, slow; high, low; early, late; full, empty; rich, poor;
    strong, weak; wet, dry; clean, dirty; true, false; loud, quiet; wide, narrow; deep, shallow;
    near, far; north, south; east, west
"""

YOUNG = """
    dog, puppy; cat, kitten; cow, calf; horse, foal; sheep, lamb; goat, kid; pig, piglet;
    bear, cub; deer, fawn; duck, duckling; goose, gosling; swan, cygnet; frog, tadpole;
    kangaroo, joey; eagle, eaglet; owl, owlet; seal, pup
"""

PLURALS = """
    child, children; mouse, mice; foot, feet; tooth, teeth; goose, geese; man, men; woman, women;
    ox, oxen; leaf, leaves; knife, knives; wife, wives; life, lives; wolf, wolves; shelf, shelves;
    thief, thieves; loaf, loaves; potato, potatoes; tomato, tomatoes; hero, heroes; city, cities;
    baby, babies; story, stories; box, boxes; church, churches
"""

PAST_TENSES = """
    go, went; see, saw; eat, ate; take, took; give, gave; write, wrote; drive, drove; break, broke;
    choose, chose; know, knew; grow, grew; fly, flew; draw, drew; swim, swam; begin, began;
    run, ran; come, came; buy, bought; think, thought; teach, taught; catch, caught; find, found;
    tell, told; keep, kept
"""


def table(text: str) -> list[list[str]]:
    """The rows of a table above: rows end with ";", columns with ","."""
    return [[cell.strip() for cell in row.split(",")] for row in text.split(";")]


def column_map(rows: list[list[str]], key: int, value: int) -> dict[str, str]:
    """Column `key` -> column `value` of the rows that have a value.

    Raises ValueError if a key comes twice: its question would have two answers.
    """
    pairs = [(row[key], row[value]) for row in rows if row[value]]
    if len(dict(pairs)) != len(pairs):
        raise ValueError(f"a key comes twice in column {key} of {rows[:2]}...")
    return dict(pairs)


def relations() -> list[Relation]:
    """All relations, each with eight phrasings."""
    countries, elements = table(COUNTRIES), table(ELEMENTS)
    code_words = [word for (word,) in table(CODE_WORDS)]
    months = [month for (month,) in table(MONTHS)]
    opposites = table(OPPOSITES)
    return [
        Relation(
            column_map(countries, 0, 1),
            (
                "What is the capital of {x}?",
                "Which city is the capital of {x}?",
                "Name the capital of {x}.",
                "What is the name of the capital of {x}?",
                "Tell me the capital of {x}.",
                "What is the capital city of {x}?",
                "What is {x}'s capital?",
                "{x} has which city as its capital?",
            ),
        ),
        Relation(
            column_map(countries, 1, 0),
            (
                "Which country has {x} as its capital?",
                "{x} is the capital of which country?",
                "Of which country is {x} the capital?",
                "Name the country whose capital is {x}.",
                "What country is {x} the capital of?",
                "Which country's capital is {x}?",
                "Tell me the country with the capital {x}.",
                "The capital {x} belongs to which country?",
            ),
        ),
        Relation(
            column_map(countries, 0, 2),
            (
                "On which continent is {x}?",
                "Which continent is {x} on?",
                "{x} lies on which continent?",
                "Name the continent of {x}.",
                "Which continent does {x} belong to?",
                "To which continent does {x} belong?",
                "Tell me the continent of {x}.",
                "On what continent does {x} lie?",
            ),
        ),
        Relation(
            column_map(elements, 0, 1),
            (
                "What is the chemical symbol of {x}?",
                "Which chemical symbol stands for {x}?",
                "Name the chemical symbol of {x}.",
                "What symbol does the element {x} have?",
                "Tell me the symbol of the element {x}.",
                "How is {x} written as a chemical symbol?",
                "What is the symbol for {x}?",
                "Which symbol does {x} have in the periodic table?",
            ),
        ),
        Relation(
            column_map(elements, 1, 0),
            (
                "Which element has the symbol {x}?",
                "What element has the chemical symbol {x}?",
                "The symbol {x} stands for which element?",
                "Name the element with the symbol {x}.",
                "Tell me the element whose symbol is {x}.",
                "Which element does the chemical symbol {x} stand for?",
                "Which element is written {x}?",
                "Which element has the symbol {x} in the periodic table?",
            ),
        ),
        Relation(
            column_map(elements, 0, 2),
            (
                "What is the atomic number of {x}?",
                "Which atomic number does {x} have?",
                "Name the atomic number of {x}.",
                "Tell me the atomic number of {x}.",
                "What atomic number does the element {x} have?",
                "What is {x}'s atomic number?",
                "The element {x} has which atomic number?",
                "How many protons does an atom of {x} have?",
            ),
        ),
        Relation(
            column_map(elements, 2, 0),
            (
                "Which element has the atomic number {x}?",
                "What element has atomic number {x}?",
                "Name the element with the atomic number {x}.",
                "Tell me the element whose atomic number is {x}.",
                "The atomic number {x} belongs to which element?",
                "Atomic number {x} is which element?",
                "Of which element is {x} the atomic number?",
                "To which element does the atomic number {x} belong?",
            ),
        ),
        Relation(
            {word[0]: word for word in code_words},
            (
                "Which code word stands for the letter {x}?",
                "What is the NATO code word for the letter {x}?",
                "Name the code word for the letter {x}.",
                "Tell me the NATO code word for {x}.",
                "How is the letter {x} said in the NATO alphabet?",
                "The letter {x} has which NATO code word?",
                "What does the NATO alphabet call the letter {x}?",
                "Which word is used for {x} in the NATO alphabet?",
            ),
        ),
        Relation(
            {month: str(number) for number, month in enumerate(months, start=1)},
            (
                "Which number does the month {x} have in the year?",
                "What is the number of the month {x}?",
                "Tell me the number of the month {x}.",
                "What number is the month {x}?",
                "Name the number of {x} among the months.",
                "How is the month {x} written as a number?",
                "Which number stands for the month {x} in a date?",
                "The month {x} has which number?",
            ),
        ),
        Relation(
            {month: months[number % 12] for number, month in enumerate(months, start=1)},
            (
                "Which month comes after {x}?",
                "What month comes after {x}?",
                "Name the month after {x}.",
                "Tell me the month that comes after {x}.",
                "What is the month after {x} called?",
                "After {x} comes which month?",
                "Which month is next after {x}?",
                "Which month begins when {x} ends?",
            ),
        ),
        Relation(
            column_map(opposites, 0, 1) | column_map(opposites, 1, 0),
            (
                "What is the opposite of {x}?",
                "Which word is the opposite of {x}?",
                "Name the opposite of {x}.",
                "Tell me the opposite of {x}.",
                "What is the opposite of the word {x}?",
                "Which word means the opposite of {x}?",
                "The opposite of {x} is which word?",
                "The word {x} has which opposite?",
            ),
        ),
        Relation(
            column_map(table(YOUNG), 0, 1),
            (
                "What is a baby {x} called?",
                "What do you call a baby {x}?",
                "What is the young of the {x} called?",
                "Name the young of the {x}.",
                "Tell me the word for a baby {x}.",
                "What is the word for a young {x}?",
                "What is a young {x} called?",
                "Which word means a baby {x}?",
            ),
        ),
        Relation(
            column_map(table(PLURALS), 0, 1),
            (
                "What is the plural of {x}?",
                "Which word is the plural of {x}?",
                "Name the plural of {x}.",
                "Tell me the plural of {x}.",
                "What is the plural of the word {x}?",
                "What is the plural form of {x}?",
                "The plural of {x} is which word?",
                "How do you write {x} in the plural?",
            ),
        ),
        Relation(
            column_map(table(PAST_TENSES), 0, 1),
            (
                "What is the past tense of {x}?",
                "Which word is the past tense of {x}?",
                "Name the past tense of {x}.",
                "Tell me the past tense of {x}.",
                "What is the past tense of the verb {x}?",
                "What is the past form of the verb {x}?",
                "The past tense of {x} is which word?",
                "How do you write {x} in the past tense?",
            ),
        ),
    ]


def shuffled(items: Iterable, rng: random.Random) -> list:
    """A copy in random order; `random()` is the one method Python promises never to change."""
    return sorted(items, key=lambda _: rng.random())


def make_splits() -> dict[str, list[Pair]]:
    """{"train": pairs, "val": pairs, "test": pairs}; see the top of this file for who goes where.

    Raises ValueError if a question comes twice.
    """
    rng = random.Random(SEED)
    splits: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
    for relation in relations():
        n = len(relation.phrasings)
        for i, (x, answer) in enumerate(shuffled(relation.rows.items(), rng)):
            # Counting round the phrasings gives each of them its share of test and val.
            for j, phrasing in enumerate(relation.phrasings):
                split = "train"
                if j == i % n:
                    split = "test"
                elif j == (i + n // 2) % n and (i // n + i) % 2 == 0:
                    split = "val"
                splits[split].append({"Question": phrasing.format(x=x), "Answer": answer})
    questions = [pair["Question"] for pairs in splits.values() for pair in pairs]
    if len(set(questions)) != len(questions):
        raise ValueError("a question comes twice")
    # In mixed order, so that the first few samples of a split are a fair picture of it.
    return {name: shuffled(pairs, rng) for name, pairs in splits.items()}


def to_json(splits: dict[str, list[Pair]]) -> str:
    """JSON with one pair on a line: easy to read and to diff."""
    blocks = []
    for name, pairs in splits.items():
        lines = ",\n".join(f"    {json.dumps(pair, ensure_ascii=False)}" for pair in pairs)
        blocks.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main() -> int:
    """Write or check the file; returns the exit code."""
    parser = argparse.ArgumentParser(description="make the default data set")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write or check")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    args = parser.parse_args()
    splits = make_splits()
    content = to_json(splits).encode()
    if args.check:
        same = args.out.is_file() and args.out.read_bytes() == content
        print(f"{args.out}: {'up to date' if same else 'differs from what make_facts.py writes'}")
        return 0 if same else 1
    args.out.write_bytes(content)
    print(f"{args.out}: " + ", ".join(f"{len(pairs)} {name}" for name, pairs in splits.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
