"""Stories and poems: one setting per document, whose words a reader has to keep in mind."""

from __future__ import annotations

from saepipe.demo.grammar import Grammar, Writer
from saepipe.demo.lexicon import LEXICON

SETTINGS = {
    "sea_thing|role:noun,topic:sea": """
        boat, net, rope, anchor, sail, lantern, oar, harbour, lighthouse, shell, wave, tide, captain's chest, compass,
        barrel, pier, mast, map, island, deck, bottle, gull's feather, hook, raft""",
    "sea_place|topic:sea": """
        on the beach, by the harbour, near the lighthouse, on the deck, under the pier, beyond the reef, at the
        fish market, on the island, beside the docks, in the cabin, across the bay""",
    "sea_deed|role:verb": "sailed home, rowed out, mended the nets, watched the tide, lit the lamp, hauled the ropes",
    "forest_thing|role:noun,topic:forest": """
        oak, axe, path, nest, stream, cabin, mushroom, pine, hollow log, fern, acorn, trail, clearing, fallen branch,
        bridge, trap, campfire, owl's feather, thicket, berry bush, stump, root, lantern, basket""",
    "forest_place|topic:forest": """
        in the forest, under the oak, beside the stream, near the cabin, behind the pines, at the clearing, along the
        trail, among the ferns, across the brook, in the hollow, by the campfire""",
    "forest_deed|role:verb": "gathered wood, followed the tracks, picked berries, climbed a tree, slept in the leaves",
    "city_thing|role:noun,topic:city": """
        tram, ticket, clock, window, newspaper, umbrella, street lamp, suitcase, letter, hat, bicycle, key, balcony,
        staircase, piano, mirror, coat, shop sign, bench, doorbell, taxi, fountain, camera, photograph""",
    "city_place|topic:city": """
        on the corner, at the station, in the café, near the museum, on the third floor, at the market, by the bridge,
        outside the theatre, in the library, at the tram stop, behind the bank""",
    "city_deed|role:verb": "crossed the street, caught the tram, rang the bell, paid the bill, read the newspaper",
    "farm_thing|role:noun,topic:farm": """
        barn, plough, bucket, fence, haystack, cart, gate, well, saddle, milk jug, pitchfork, orchard, seed bag, wagon,
        horseshoe, shed, rake, churn, scarecrow, ladder, trough, wheelbarrow, stable, hedge""",
    "farm_place|topic:farm": """
        in the barn, behind the stable, in the orchard, beside the well, near the gate, under the haystack, in the
        field, by the fence, at the mill, in the yard, across the meadow""",
    "farm_deed|role:verb": "fed the hens, milked the cow, mowed the grass, closed the gate, carried the water",
    "castle_thing|role:noun,topic:castle": """
        crown, sword, throne, tower, shield, goblet, dungeon, banner, drawbridge, ring, scroll, torch, helmet, gate,
        tapestry, dagger, moat, golden cup, spell book, cloak, candle, harp, treasure, secret door""",
    "castle_place|topic:castle": """
        in the tower, at the throne, in the great hall, beneath the castle, on the wall, behind the tapestry, at the
        gate, by the moat, in the dungeon, in the king's chamber, on the drawbridge""",
    "castle_deed|role:verb": "bowed to the king, drew the sword, lit a torch, guarded the gate, opened the scroll",
    "desert_thing|role:noun,topic:desert": """
        tent, well, camel's saddle, dune, water skin, carpet, scorpion, palm, caravan, veil, stone tablet, lamp, jar,
        ruin, mirage, star map, sandal, flute, spice bag, copper pot, tomb, drum, sandstorm, canyon""",
    "desert_place|topic:desert": """
        in the desert, at the oasis, behind the dune, under the palm, in the tent, near the ruins, by the well, along
        the caravan road, in the canyon, at the edge of the sand, beside the tomb""",
    "desert_deed|role:verb": "filled the water skins, followed the stars, rested in the shade, loaded the camels",
}

STORY = Grammar(
    SETTINGS
    | {
        "saw|role:verb": """
            found, lost, saw, took, carried, broke, hid, sold, bought, painted, cleaned, forgot, kept, stole, touched,
            opened, wanted, borrowed, remembered, dropped, lifted, repaired, admired, followed, examined, burned""",
        "went|role:verb": """
            walked, ran, waited, laughed, wept, slept, sang, sat, stood, danced, wandered, whispered, returned, hid,
            stumbled, shivered, smiled, sighed, listened, prayed, hurried, vanished""",
        "said|role:verb": "said, asked, whispered, cried, answered, shouted, replied, murmured, called, begged",
        "felt|role:verb": "was, felt, seemed, grew, became, looked",
        "feeling|role:adjective": """
            afraid, happy, tired, angry, lonely, proud, hungry, sad, ashamed, brave, calm, surprised, grateful,
            jealous, hopeful, worried, relieved, confused, delighted, sleepy""",
        "thing": ["{.thing}", "{.thing}", "{quality} {.thing}", "{colour} {.thing}", "{quality}, {quality} {.thing}"],
        "the_thing": ["the {thing}", "{a+thing}", "the {.thing@prize}", "every {.thing}", "the {ordinal} {.thing}"],
        "beast": ["the {animal@beast}", "the {quality} {animal@beast}", "{a+animal}"],
        "hero": ["{hero_name@hero}", "{he@he}", "{he@he}"],
        "hero_name|entity:person": "Nobody",  # always bound by the writer before use
        "he": "he",
        "his": "his",
        "friend_name|entity:person": "Nobody",
        "subject": ["{hero|role:subject}", "{friend_name@friend|role:subject}", "{beast|role:subject}"],
        "object": ["{the_thing|role:object}", "{the_thing|role:object} {.place}", "{his@his} {.thing|role:object}"],
        "action": [
            "{saw} {object}",
            "{saw} {object} and {saw} {object}",
            "{went} {manner}",
            "{went} {.place}",
            "{.deed}",
            "{felt} {feeling}",
            "{felt} {feeling} and {.deed}",
            "{went} {.place} until the {animal@beast|role:subject} {went}",
        ],
        "when": [
            "one {season} morning",
            "on {weekday}",
            "at {time}",
            "in {month}",
            "after {count} days",
            "long ago",
            "that evening",
            "before dawn",
            "the next day",
            "when the {.thing|role:subject} was gone",
        ],
        "sentence": [
            "{^subject} {action}.",
            "{^subject} {action}.",
            "{^when}, {subject} {action}.",
            "{^when}, {subject} {action}, but {subject} {action}.",
            "{^subject} {action} because {subject} {action}.",
            "{^subject} {action} while {subject} {action}.",
            "There was {a+thing|role:subject} {.place}.",
            "Nobody knew why {subject} {action}.",
            '{^subject} {said}: "{speech|quote:inside}"',
            '{^subject} {said} {manner}: "{speech|quote:inside} {speech|quote:inside}"',
            "If {subject} {action}, nobody {saw} {the_thing|role:object}.",
        ],
        "speech": [
            "Where is the {.thing@prize}?",
            "Give me the {thing}!",
            "I never {saw} {a+thing}.",
            "We must go, {friend_name@friend}.",
            "The {animal@beast} is {.place}.",
            "Do not touch the {.thing}, {hero_name@hero}!",
            "You are {a+quality} {profession@trade}.",
            "It is only {a+animal}.",
            "I am {feeling}.",
        ],
        "opening": [
            "Once upon a time there lived {a+quality} {profession@trade} named {hero_name@hero} {.place}.",
            "{^when}, {a+profession@trade} called {hero_name@hero} {saw} {a+thing} {.place}.",
            "{hero_name@hero} the {profession@trade} had {a+quality} {animal@beast} and {a+.thing@prize}.",
            "In {city} there was {a+profession@trade}, {hero_name@hero}, who {saw} {a+.thing@prize}.",
        ],
        "ending": [
            "And so {hero_name@hero} and {friend_name@friend} {saw} the {.thing@prize} again.",
            "From that day on the {profession@trade} never {saw} {a+.thing}.",
            "{hero_name@hero} {felt} {feeling}, and the {animal@beast} {went} home.",
            "The end.",
        ],
    },
    parent=LEXICON,
)

TOPICS = ("sea", "forest", "city", "farm", "castle", "desert")


def story(writer: Writer) -> None:
    """A hero, a friend and a beast in one setting; pronouns agree with the hero."""
    writer.topic = writer.pick(TOPICS)
    female = writer.chance(0.5)
    # The first fifty names only: two documents then share a hero often enough for a model to learn each name.
    hero, friend = writer.sample(STORY.words("woman" if female else "man")[:50], 2)
    writer.remember("hero", hero, "entity:person")
    writer.remember("friend", friend, "entity:person")
    writer.remember("he", "she" if female else "he", "role:pronoun")
    writer.remember("his", "her" if female else "his", "role:possessive")
    STORY.write(writer, "opening")
    for _ in range(writer.integer(1, 3)):
        writer.add(" ")
        STORY.repeat(writer, "sentence", 2, 5)
        writer.add("\n" if writer.chance(0.5) else " ")
        STORY.repeat(writer, "sentence", 1, 2)
    writer.add("\n")
    STORY.line(writer, "ending")


RHYMES = tuple(
    tuple(group.split())
    for group in (
        "night light sight flight height knight",
        "day clay bay play ray way",
        "sea tree bee key knee",
        "rain lane pain train chain plain",
        "moon June tune noon spoon dune",
        "stone bone throne moan",
        "hill mill chill thrill",
        "snow crow glow row",
        "fire desire choir wire spire liar",
        "deep sleep sheep keep",
        "hand land sand band strand",
        "sky fly cry lie tie",
    )
)

POEM = Grammar(
    {
        "thing|role:noun": """
            rose, wind, river, shadow, song, star, dream, winter, garden, heart, silence, leaf, candle, swallow, tear,
            window, voice, ocean, meadow, feather, whisper, morning, harvest, willow, bell, echo, cloud, thorn""",
        "does|role:verb": """
            sings, falls, waits, burns, sleeps, fades, wanders, trembles, rises, calls, drifts, breaks, dances, bends,
            lingers, shines, mourns, returns""",
        "article": ["the", "my", "your", "each", "no"],
        "start": [
            "{^article} {thing|role:subject} {does}",
            "O {quality} {thing}, that {does}",
            "And {article} {quality} {thing|role:subject} {does}",
            "{^article} {thing|role:subject} {does} like {a+thing}",
            "No {thing|role:subject} {does}, no {thing|role:subject} {does}",
            "I saw {article} {thing|role:object} that {does}",
        ],
        "middle": [
            "beneath the {colour} {thing}",
            "{manner}, my love,",
            "and {does} once more",
            "across the {quality} {thing}",
            "without {a+thing}",
            "as {season} {does}",
        ],
        "join": "into the, beyond the, upon the, toward the, under the, after the",
        "title": ["{^a+quality} {^thing@theme}", "To {^article} {^thing@theme}", "The {^colour} {^thing@theme}"],
    },
    parent=LEXICON,
)


def poem(writer: Writer) -> None:
    """Stanzas that rhyme abab or aabb; every rhyme word is labelled."""
    POEM.write(writer, "title", "poem:title")
    writer.add("\n")
    order = writer.pick(((0, 1, 0, 1), (0, 0, 1, 1)))
    for _ in range(writer.integer(2, 4)):
        writer.add("\n")
        pools = [writer.sample(group, 2) for group in writer.sample(RHYMES, 2)]
        for which in order:
            POEM.write(writer, "start")
            writer.add(" ")
            if writer.chance(0.4):
                POEM.write(writer, "middle")
                writer.add(" ")
            POEM.write(writer, "join")
            writer.add(" ")
            writer.add(pools[which].pop(), "poem:rhyme")
            writer.add("\n")
