"""The hand-written part of the demonstration's story: its chapters, and what one may say of a
thing.

Data only. story.py fills each chapter with plain sentences about its people and buildings, of the
kind that the built-in model was trained to read, and puts the facts in.
"""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "# The Ferry Ledger"

# What each noun may be called, so that no lamp is narrow and no street is steady.
KINDS = {
    noun: adjectives.split()
    for noun, adjectives in {
        "street": "quiet narrow old long empty",
        "road": "long narrow empty quiet old",
        "field": "open empty large cold quiet",
        "garden": "small quiet old warm open",
        "path": "narrow long old empty quiet",
        "market": "large early empty new quiet",
        "letter": "long plain old careful new small",
        "report": "careful long plain new early",
        "boat": "small old slow light new",
        "cart": "slow heavy old small empty",
        "window": "open small narrow old cold",
        "table": "heavy plain large old empty",
        "lamp": "warm small old steady",
        "door": "heavy narrow old open small",
        "bell": "old heavy small",
        "stone": "cold heavy old small large",
        "roof": "old new large plain",
        "fence": "old new long plain",
    }.items()
}
WRITTEN = ("letter", "report")
PLACES = ("street", "road", "field", "garden", "path", "market")
OBJECTS = ("boat", "cart", "window", "table", "lamp", "door", "bell", "stone", "roof", "fence")
WHERE = ("near", "behind", "beside")


@dataclass(frozen=True)
class Chapter:
    """One town of the journey. Its people and buildings are what its sentences speak of."""

    town: str
    people: tuple[str, str]
    buildings: tuple[str, str]
    opening: str
    closing: str


CHAPTERS = (
    Chapter(
        "Bergen",
        ("Ada", "Finn"),
        ("harbour", "archive"),
        "The old ledger of the ferry was lost in the winter, and nobody knew what had stood in "
        "it. So the council gave Nils a new ledger and a warm coat. He was to walk from town to "
        "town, and in every town he was to ask, to listen and to write. Greta, the clerk, gave "
        "him a lamp for the road.",
        "In the evening Nils put the ledger under his coat. The ferry left Bergen in a light rain.",
    ),
    Chapter(
        "Oslo",
        ("Hugo", "Olga"),
        ("library", "tower"),
        "Nils came to Oslo on a cold morning. The road from the ferry was long, and the snow was "
        "heavy on the roofs. He asked for a table and a lamp, and Hugo gave him both.",
        "There was nothing in Oslo for the ledger. Nils slept well and walked on.",
    ),
    Chapter(
        "Malmo",
        ("Viktor", "Yara"),
        ("theatre", "bakery"),
        "The cart to Malmo was slow and the wind was early. Nils heard the bell of the town before "
        "he saw the wall. Yara opened the door and said that he was late.",
        "Nils wrote a letter to Greta and gave it to the morning boat.",
    ),
    Chapter(
        "Turku",
        ("Iris", "Pavel"),
        ("mill", "chapel"),
        "In Turku the ice stood in the river, and the ferry had to wait. Nils had time, and he "
        "liked the quiet. Pavel told him about the old mill and the men who had built it.",
        "Turku had no line for the ledger. When the river was open again, the ferry went on.",
    ),
    Chapter(
        "Tartu",
        ("Emil", "Rosa"),
        ("observatory", "school"),
        "It was a late evening when Nils came to Tartu. The children of the school met him on the "
        "road, for they had heard of the ledger. They asked him what he had written, and he said "
        "that it was not much.",
        "The children walked with him to the last fence of the town.",
    ),
    Chapter(
        "Vilnius",
        ("Anton", "Tara"),
        ("museum", "bridge"),
        "Nils walked to Vilnius in four days. On the third day he lost the path and slept beside a "
        "field. Tara found him in the morning and gave him bread.",
        "There was no line for Vilnius, and Nils was sorry for it.",
    ),
    Chapter(
        "Gdansk",
        ("Wanda", "Jonas"),
        ("foundry", "depot"),
        "The road to Gdansk was plain and long. A letter from Greta was waiting at the depot. She "
        "wrote that the council was careful and slow, as it had always been.",
        "Nils read the letter again beside the lamp, and then he slept.",
    ),
    Chapter(
        "Kiel",
        ("Sven", "Dina"),
        ("lighthouse", "chapel"),
        "The sea was open, and the boat to Kiel was small. Nils held the ledger under his coat all "
        "night. Sven stood at the water with a lamp and called the boat in.",
        "He left Kiel early, before the market opened, and his ledger was as it had been.",
    ),
    Chapter(
        "Aarhus",
        ("Mira", "Leo"),
        ("station", "orchard"),
        "In Aarhus the snow was gone, and the fields were wet. Nils walked slowly, because the "
        "days were long now. Leo had a cart, and he took him to the town.",
        "The orchard was quiet when he went on, and the road was dry.",
    ),
    Chapter(
        "Delft",
        ("Otto", "Klara"),
        ("school", "quarry"),
        "Delft was flat, and Nils saw it a day before he came to it. The boats were higher than "
        "the roads. Klara laughed at his winter coat and gave him water.",
        "She had no line for him, but she showed him the best road to Ghent.",
    ),
    Chapter(
        "Ghent",
        ("Cleo", "Ben"),
        ("chapel", "bakery"),
        "The spring came to Ghent before Nils did. Every window was open, and every street had a "
        "market. Ben said that the town had a long memory and a short road.",
        "Nobody in Ghent had a line for the ledger, but everybody had an old story.",
    ),
    Chapter(
        "Bruges",
        ("Frida", "Carl"),
        ("tower", "garden"),
        "Bruges lies near Ghent, and Nils walked there in one day. The water was quiet, and the "
        "boats were old. Frida gave him a room above the garden.",
        "In the night he heard the bell, and he counted the towns that he had seen.",
    ),
    Chapter(
        "Lyon",
        ("Marta", "Elias"),
        ("theatre", "bridge"),
        "Two rivers meet in Lyon, and Nils crossed both of them. He had never been so far from the "
        "sea. Marta asked him to read to her from the ledger, and he did.",
        "Lyon gave him good bread and no line. He turned to the west.",
    ),
    Chapter(
        "Nantes",
        ("Lena", "Tomas"),
        ("library", "depot"),
        "The road to Nantes followed the river to the sea. In the evenings Nils wrote to Greta, "
        "and in the mornings he walked. Tomas knew every boat in the town by its bell.",
        "Tomas found him a boat to the north, and the ledger went under the coat again.",
    ),
    Chapter(
        "Bath",
        ("Signe", "Jakob"),
        ("museum", "orchard"),
        "The water of Bath is warm in every season, and Nils put his feet in it. The people of the "
        "town were old and in no hurry. Signe told him that nothing had happened there for years.",
        "That was no line for the ledger, and Nils took the cart to the north.",
    ),
    Chapter(
        "Leeds",
        ("Egon", "Uma"),
        ("mill", "depot"),
        "A slow cart took Nils to Leeds in the rain. The rain was steady, and so was the cart. Uma "
        "asked him for the ledger, and she read it from the first line to the last.",
        "She gave it back and said that it was a good ledger, and that it was not yet full.",
    ),
    Chapter(
        "York",
        ("Zeno", "Berta"),
        ("museum", "school"),
        "The wall of York was old, and the road went under it. Nils was tired, and his coat was "
        "not warm any more. Berta gave him a new one, and he thanked her.",
        "He stayed in York for two days without a line, and then he took the last road.",
    ),
    Chapter(
        "Cork",
        ("Kira", "Quinn"),
        ("harbour", "lighthouse"),
        "Cork was the last town of the year. The harbour was full of boats, and Nils knew that one "
        "of them would take him home. He walked past all of them and looked for Quinn.",
        "Then Nils closed the ledger. The ferry left in the morning, and Greta stood at the "
        "harbour when he came home. She took the ledger and put it on the table of the council, "
        "and nobody ever lost it again.",
    ),
)

REPORT_TITLE = "# The Report of the Council"

# The council reads the ledger. Each section states one key point.
REPORT_SECTIONS = (
    Chapter(
        "Bergen",
        ("Ada", "Finn"),
        ("harbour", "archive"),
        "The council met on the first day of the summer, and the ledger lay on the table. Greta "
        "read from it, and a clerk wrote this report.",
        "The council thanked the people of Bergen and turned the page.",
    ),
    Chapter(
        "Malmo",
        ("Viktor", "Yara"),
        ("theatre", "bakery"),
        "The second page was about Malmo. Nils had been there in the winter, and his letters were "
        "long.",
        "Nobody asked for more about Malmo.",
    ),
    Chapter(
        "Tartu",
        ("Emil", "Rosa"),
        ("observatory", "school"),
        "The children of Tartu had sent a letter of their own. The council read it twice.",
        "The council wrote a small letter to the children.",
    ),
    Chapter(
        "Leeds",
        ("Uma", "Egon"),
        ("mill", "depot"),
        "Then the council came to Leeds. It had rained there, as it always does, and the page was "
        "not dry.",
        "The page was put near the lamp.",
    ),
    Chapter(
        "Cork",
        ("Kira", "Quinn"),
        ("lighthouse", "harbour"),
        "The last page was about Cork, where the journey had come to its end.",
        "With this the council closed the report, and everybody walked home along the harbour.",
    ),
)
