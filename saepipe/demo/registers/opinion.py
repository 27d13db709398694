"""Dialogues and reviews with a sentiment that all their judging words share."""

from __future__ import annotations

from saepipe.demo.grammar import Grammar, Writer
from saepipe.demo.lexicon import LEXICON

WORDS = {
    "positive_adjective|role:adjective,sentiment:positive": """
        wonderful, great, excellent, lovely, perfect, delicious, charming, brilliant, superb, delightful, fantastic,
        beautiful, amazing, pleasant, marvellous, outstanding, friendly, splendid, impressive, enjoyable, fresh,
        comfortable, spotless, generous, magnificent""",
    "negative_adjective|role:adjective,sentiment:negative": """
        terrible, awful, horrible, boring, dreadful, disgusting, rude, poor, disappointing, dirty, miserable, ugly,
        nasty, useless, stale, unpleasant, appalling, shameful, annoying, overpriced, broken, noisy, tasteless,
        hopeless, pathetic""",
    "positive_verb|role:verb,sentiment:positive": "loved, enjoyed, adored, liked, admired, praised, recommended",
    "negative_verb|role:verb,sentiment:negative": "hated, regretted, disliked, despised, endured, resented, cursed",
    "positive_adverb|role:adverb,sentiment:positive": "happily, beautifully, perfectly, kindly, wonderfully",
    "negative_adverb|role:adverb,sentiment:negative": "badly, rudely, poorly, horribly, carelessly",
    "positive_cry|sentiment:positive": "Hooray!, Bravo!, What a joy!, I am so glad!, How nice!, Well done!, Splendid!",
    "negative_cry|sentiment:negative": "What a shame!, How awful!, I am furious!, Never again!, Shame on them!, Ugh!",
    "positive_verdict|sentiment:positive": [
        "I would come back tomorrow",
        "everyone should go",
        "it made me smile",
        "it was worth every penny",
        "I recommend it to all my friends",
    ],
    "negative_verdict|sentiment:negative": [
        "I want my money back",
        "nobody should go",
        "it made me sick",
        "it was a waste of money",
        "I warned all my friends",
    ],
    "restaurant_part|role:noun": """
        soup, waiter, dessert, menu, fish, service, wine, kitchen, bread, table, sauce, steak""",
    "hotel_part|role:noun": "room, bed, breakfast, reception, view, pool, shower, lobby, staff, pillow, lift, balcony",
    "film_part|role:noun": "plot, actor, ending, music, dialogue, script, camera, scene, heroine, director, costume",
    "book_part|role:noun": "chapter, author, cover, style, hero, story, translation, ending, language, preface, index",
    "phone_part|role:noun": "screen, battery, camera, sound, keyboard, charger, software, case, display, button, price",
    "concert_part|role:noun": "singer, orchestra, hall, choir, violin, drummer, encore, ticket, stage, audience, seat",
}

MOODS = ("positive", "negative")
REMARKS = (
    "{^the_part} was {MOOD_adjective}.",
    "{^the_part} was {intensity} {MOOD_adjective}.",
    "I {MOOD_verb} the {.part|role:object}, and {MOOD_verdict}.",
    "We {MOOD_verb} the {MOOD_adjective} {.part|role:object}.",
    "{^MOOD_verdict}, because {the_part} was {MOOD_adjective}.",
    "{person@critic|role:subject} {MOOD_verb} the {.part|role:object} and everything went {MOOD_adverb}.",
    "What {a+MOOD_adjective} {.part}! {MOOD_cry}",
    "The {.part|role:subject} was {MOOD_adjective} and the {.part|role:subject} {MOOD_adjective}.",
    "I did not expect such {a+MOOD_adjective} {.part}.",
)

OPINION = Grammar(
    WORDS
    | {f"{mood}_remark": [remark.replace("MOOD", mood) for remark in REMARKS] for mood in MOODS}
    | {
        "intensity|role:adverb": "very, really, quite, truly, absolutely, simply, so",
        "the_part": ["the {.part|role:subject}", "the {colour} {.part|role:subject}", "their {.part|role:subject}"],
        "question": [
            "How was the {.part@asked}?",
            "What did you think of the {.part@asked}?",
            "And the {.part}?",
            "Did you go on {weekday@day} with {woman@companion}?",
            "Was it in {city@town}?",
            "Tell me about the {.part}.",
            "Were you there at {time}?",
        ],
        "neutral": [
            "Yes, we went on {weekday@day} with {woman@companion}.",
            "It was in {city@town}, and we paid {money@price}.",
            "I see.",
            "Go on.",
            "We waited for {count} hours.",
            "The {.part@asked|role:subject}? Let me think.",
        ],
    },
    parent=LEXICON,
)

TOPICS = ("restaurant", "hotel", "film", "book", "phone", "concert")


def dialogue(writer: Writer) -> None:
    """Two people talk about one thing; one asks, the other answers in one mood."""
    writer.topic = writer.pick(TOPICS)
    names = [*writer.sample(OPINION.words("woman"), 2), *writer.sample(OPINION.words("man"), 2)]
    asking, answering = writer.sample(names, 2)
    mood = writer.pick(MOODS)
    writer.add(asking, "dialogue:speaker", "entity:person")
    writer.add(f": So you know the new {writer.topic}? ")
    OPINION.line(writer, "question")
    for _ in range(writer.integer(3, 6)):
        writer.add(answering, "dialogue:speaker", "entity:person")
        writer.add(": ")
        if writer.chance(0.3):
            OPINION.write(writer, "neutral")
            writer.add(" ")
        start = writer.length
        OPINION.repeat(writer, f"{mood}_remark", 1, 2)
        writer.label_from(start, f"mood:{mood}")
        writer.add("\n")
        writer.add(asking, "dialogue:speaker", "entity:person")
        writer.add(": ")
        OPINION.line(writer, "question" if writer.chance(0.7) else f"{mood}_cry")


def review(writer: Writer) -> None:
    """A review whose stars, title and remarks agree."""
    writer.topic = writer.pick(TOPICS)
    mood = writer.pick(MOODS)
    stars = writer.integer(4, 5) if mood == "positive" else writer.integer(1, 2)
    writer.add("Review of a ")
    writer.add(writer.topic, "review:topic")
    writer.add("\nRating: ")
    writer.add(f"{stars}/5", "review:rating")
    writer.add("\n")
    start = writer.length
    writer.add("Title: ")
    OPINION.line(writer, f"{mood}_cry")
    OPINION.repeat(writer, f"{mood}_remark", 3, 7)
    writer.label_from(start, f"mood:{mood}")
    if writer.chance(0.5):
        writer.add("\nReviewed by ")
        OPINION.write(writer, "person")
        writer.add(" on ")
        OPINION.write(writer, "date")
    writer.add("\n")
