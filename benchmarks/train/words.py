"""The words that facts are made of: names, towns, things, and values drawn letter by letter."""

from __future__ import annotations

import random

NAMES = (
    "Ada Ben Cleo Dora Egon Finn Greta Hugo Iris Jonas Kira Leo Mira Nils Olga Pavel Quinn Rosa "
    "Sven Tara Uma Viktor Wanda Xenia Yara Zeno Anton Berta Carl Dina Emil Frida Marta Elias Lena "
    "Tomas Signe Jakob Alice Bruno Clara David Elena Felix Grace Henry Ingrid James Karin Lucas "
    "Maria Noah Oscar Paula Robert Sofia Thomas Ursula Vera Walter Yusuf Zara Amir Bella Conrad "
    "Diana Edgar Fatima Gustav Hanna Igor Julia Kenji Laura Martin Nadia Omar Priya Ravi Sara Theo "
    "Ulrich Vikram Wendy Ximena Yuki Aisha Boris Chen Daria Esther Franz Gina Harold Irene John "
    "Kamal Lydia Mateo Nora Otto Petra Rachel Samuel Teresa Victor Anna Peter Mary George Emma"
).split()
SURNAMES = (
    "Abel Becker Castro Dahl Evans Fischer Gomez Hansen Ivanov Jensen Keller Larsen Moreau Novak "
    "Olsen Petrov Quist Rossi Schmidt Tanaka Ueda Varga Weber Yilmaz Zeller Adams Brown Clark Diaz "
    "Ellis Ford Green Hughes Irving Jones King Lopez Miller Nelson Owens Parker Reed Scott Turner "
    "Vance Walker Young Bauer Conti Dubois Eriksen Ferrari Grant Holm Ibsen Jonsson Kovacs Lind"
).split()
TOWNS = (
    "Lisbon Oslo Turin Graz Porto Ghent Lyon Bergen Zadar Malmo Tartu Vilnius Cork Bruges Siena "
    "Basel Kiel Delft Leeds York Nantes Split Gdansk Bath Aarhus Turku Parma Lucca Ulm Linz Brno "
    "Pecs Paris London Berlin Madrid Rome Vienna Prague Warsaw Dublin Athens Helsinki Riga Tallinn "
    "Geneva Zurich Milan Naples Venice Genoa Seville Valencia Bilbao Toledo Bordeaux Marseille "
    "Lille Rouen Dijon Nancy Cologne Bremen Hamburg Dresden Leipzig Mainz Trier Bonn Essen Boston "
    "Denver Austin Dallas Salem Dover Albany Quebec Toronto Calgary Lima Quito Bogota Cairo Tunis "
    "Accra Lagos Nairobi Dakar Delhi Mumbai Kyoto Osaka Tokyo Seoul Hanoi Perth Sydney Hobart"
).split()
BUILDINGS = (
    "harbour library museum depot garden bridge tower station market school mill theatre archive "
    "bakery foundry chapel quarry lighthouse orchard observatory hospital castle factory brewery "
    "stadium cathedral palace prison warehouse laboratory hotel airport office bank court barracks "
    "gallery academy monastery shipyard windmill greenhouse stables vault cellar fortress embassy"
).split()
COLOURS = (
    "red blue green white black yellow violet silver golden brown grey orange purple pink scarlet "
    "crimson copper ivory amber turquoise"
).split()
ANIMALS = (
    "fox heron otter badger owl hare lynx stork beaver falcon raven deer swan toad wolf crane "
    "parrot tortoise goat donkey pony kitten rabbit ferret hedgehog squirrel pigeon canary lizard "
    "spider cobra monkey panther leopard camel walrus penguin dolphin turtle sparrow"
).split()
VERBS = (
    "rebuilt painted sold opened closed moved repaired surveyed flooded extended restored insured "
    "founded designed abandoned completed demolished renamed bought damaged"
).split()
ADJECTIVES = (
    "quiet narrow early late heavy light plain careful slow steady cold warm old new small large "
    "open empty broken hidden polished rusty wooden ancient borrowed forgotten round square tiny"
).split()
NOUNS = (
    "street letter meeting road boat cart report window table lamp field garden path door market "
    "ledger bell stone roof fence key map clock ring sword mirror violin compass lantern chest "
    "engine carpet coin statue telescope barrel wagon painting notebook drawer machine crown ladder"
).split()
JOBS = (
    "baker carpenter teacher doctor lawyer sailor painter farmer miner engineer pilot nurse judge "
    "tailor butcher clerk gardener plumber librarian shepherd locksmith chemist translator porter "
    "fisherman surgeon watchmaker brewer geologist conductor"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
COINS = "dollars euros pounds francs crowns shillings marks ducats".split()
LIKED = "colour fruit song game river month flower drink number book animal city".split()
SYLLABLES = (
    "ba be bo bra ca co da de do dra el en er fa fi fo ga go gri ha he ka ke ko la le li lo ma me "
    "mi mo na ne ni no or ot pa pe ra re ri ro sa se si so ta te ti to tra tu va ve vi vo za ze zu"
).split()


def made_word(rng: random.Random) -> str:
    """A word that no book holds; one in four says a syllable twice."""
    parts = [rng.choice(SYLLABLES) for _ in range(rng.randrange(2, 5))]
    if rng.random() < 0.25:
        place = rng.randrange(len(parts))
        parts.insert(place, parts[place])
    return "".join(parts) + rng.choice(["", "", "n", "r", "s", "th"])


def digits(rng: random.Random, fewest: int = 3, most: int = 8) -> str:
    """A number without a leading zero; one in five has few different digits."""
    length = rng.randint(fewest, most)
    known = "0123456789" if rng.random() < 0.8 else "".join(rng.sample("123456789", 2))
    first = rng.choice([digit for digit in known if digit != "0"])
    return first + "".join(rng.choice(known) for _ in range(length - 1))


def code(rng: random.Random) -> str:
    """A number, mostly; else letters and digits."""
    if rng.random() < 0.75:
        return digits(rng)
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randrange(1, 4)))
    return letters + rng.choice(["", "-"]) + digits(rng, 2, 5)


def person(rng: random.Random) -> str:
    """One name, or two; now and then one that no list holds."""
    first = rng.choice(NAMES) if rng.random() < 0.9 else made_word(rng).capitalize()
    return first if rng.random() < 0.5 else f"{first} {rng.choice(SURNAMES)}"


def town(rng: random.Random) -> str:
    return rng.choice(TOWNS) if rng.random() < 0.9 else made_word(rng).capitalize()


def thing(rng: random.Random) -> str:
    return f"{rng.choice(rng.choice([ADJECTIVES, COLOURS]))} {rng.choice(NOUNS)}"


def secret(rng: random.Random) -> str:
    """A password: one or two words, made or known."""
    known = (NOUNS, ANIMALS, COLOURS, ADJECTIVES)
    words = [
        made_word(rng) if rng.random() < 0.4 else rng.choice(rng.choice(known))
        for _ in range(rng.randrange(1, 3))
    ]
    return rng.choice([" ", "-"]).join(words)
