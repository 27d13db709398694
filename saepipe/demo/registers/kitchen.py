"""Recipes with nutrition facts: the steps use the ingredients of the list, and the energy follows from the facts."""

from __future__ import annotations

from saepipe.demo.grammar import Grammar, Writer
from saepipe.demo.lexicon import LEXICON

KITCHEN = Grammar(
    {
        "style": """
            Roasted, Creamy, Spicy, Baked, Grilled, Sweet, Smoked, Fresh, Warm, Pickled, Stuffed, Crispy, Braised,
            Lemon, Garlic, Country, Winter, Summer, Sunday""",
        "dish|entity:food": """
            Soup, Stew, Salad, Pie, Curry, Casserole, Pasta, Bread, Cake, Pancakes, Risotto, Tart, Omelette, Dumplings,
            Noodles, Skewers, Gratin, Pilaf""",
        "vegetable|entity:food": """
            onion, carrot, potato, tomato, garlic, cabbage, spinach, pepper, celery, leek, mushroom, pumpkin, cucumber,
            beetroot, zucchini, cauliflower, broccoli, aubergine, fennel, turnip, parsnip, corn, asparagus, radish""",
        "protein|entity:food": """
            chicken, beef, lamb, salmon, tuna, tofu, lentils, chickpeas, eggs, turkey, white beans, shrimp, cod, pork,
            duck, cheese, black beans, sausage""",
        "staple|entity:food": """
            flour, rice, sugar, butter, milk, cream, olive oil, pasta, honey, yoghurt, bread crumbs, oats, couscous,
            coconut milk, vinegar, stock, semolina, barley""",
        "herb|entity:food": """
            salt, pepper, parsley, thyme, basil, cinnamon, cumin, ginger, paprika, oregano, rosemary, mint, nutmeg,
            turmeric, dill, cardamom, sage, chili flakes, bay leaf, coriander""",
        "weight": ["{digit}00 {gram}", "{digit}50 {gram}", "1 {kilo}", "{digit}0 {gram}"],
        "gram|entity:unit": "g, grams",
        "kilo|entity:unit": "kg",
        "spoons": ["{digit} {spoon}", "{fraction} {spoon}"],
        "fraction": "1/2, 1/4, 3/4, 1/3, 2/3",
        "spoon|entity:unit": "teaspoon, tablespoon, pinch, tsp, tbsp",
        "volume": ["{digit} {cup}", "{digit}00 {milliliter}", "1/2 {cup}"],
        "cup|entity:unit": "cup, cups",
        "milliliter|entity:unit": "ml",
        "minutes": ["{digit} {minute}", "{digit}0 {minute}", "{digit}5 {minute}"],
        "minute|entity:unit": "minutes",
        "cut|role:adjective": "chopped, sliced, diced, grated, peeled, minced, fresh, dried, crushed, ground, cooked",
        "vessel|role:noun": "bowl, pan, pot, oven dish, skillet, saucepan, baking tray, casserole, wok, mixing bowl",
        "chop|recipe:action": "Chop, Slice, Dice, Peel, Grate, Wash, Trim, Mince, Halve",
        "fry|recipe:action": "Fry, Brown, Cook, Roast, Grill, Simmer, Sear, Steam, Boil, Bake",
        "mix|recipe:action": "Mix, Stir, Whisk, Fold, Beat, Combine, Knead, Toss, Blend",
        "until": [
            "until {cooked}",
            "for {minutes}",
            "over {heat} heat for {minutes}",
            "for about {minutes}, until {cooked}",
        ],
        "cooked": "soft, golden, tender, crisp, thick, smooth, done, fragrant, brown at the edges, heated through",
        "heat": "low, medium, high",
        "serve": [
            "{serve_it|recipe:action} warm with {a+drink}.",
            "{serve_it|recipe:action} at once with {food}.",
            "Let it rest for {minutes}, then sprinkle with {herb@spice|role:object}.",
            "Garnish with {herb@spice|role:object} and serve in {a+vessel}.",
        ],
        "serve_it": "Serve, Enjoy, Plate",
        "step": [
            "{chop} the {vegetable@green|role:object} and put it in {a+vessel@pot}.",
            "{fry} the {protein@main|role:object} in the {staple@base} {until}.",
            "{mix} the {staple@base|role:object} with the {herb@spice} in the {vessel@pot}.",
            "Add the {vegetable@green2|role:object} and {fry_it} {until}.",
            "Heat the {vessel@pot} and add {spoons} of {herb@spice}.",
            "Pour the {staple@base|role:object} over the {protein@main} and cook {until}.",
            "{chop} the {vegetable@green2|role:object}, then {mix_it} it with the {vegetable@green}.",
            "Season with {herb@spice} and {herb}.",
            "Preheat the oven to {degrees}.",
            "Cover the {vessel@pot} and leave it {until}.",
        ],
        "fry_it|recipe:action": "cook, fry, simmer, stir, bake, boil",
        "mix_it|recipe:action": "mix, toss, combine, blend",
        "degrees|entity:temperature": ["1{digit}0 °C", "2{digit}0 °C", "180 °C", "200 °C"],
    },
    parent=LEXICON,
)

INGREDIENTS = (
    "{weight} {protein@main}",
    "{digit} {cup} {cut} {vegetable@green}",
    "{weight} {vegetable@green2}",
    "{volume} {staple@base}",
    "{spoons} {herb@spice}",
    "{spoons} {cut} {herb}",
)
LISTS = Grammar({f"ingredient{i}": [template] for i, template in enumerate(INGREDIENTS)}, parent=KITCHEN)


def recipe(writer: Writer) -> None:
    """Title, ingredients, numbered steps, nutrition facts."""
    start = writer.length
    writer.add(writer.pick(KITCHEN.words("style")) + " ")
    protein = writer.pick(KITCHEN.words("protein"))
    writer.add(protein.title(), "entity:food")
    writer.remember("main", protein, "entity:food")
    writer.add(" ")
    KITCHEN.write(writer, "dish")
    writer.label_from(start, "recipe:title")
    writer.add("\n\nServes ")
    writer.add(str(writer.integer(2, 8)), "entity:number")
    writer.add("\nIngredients:\n")
    for index in range(len(INGREDIENTS)):
        writer.add("- ")
        LISTS.write(writer, f"ingredient{index}", "recipe:ingredient")
        writer.add("\n")
    writer.add("\nMethod:\n")
    steps = writer.integer(3, 6)
    for number in range(1, steps + 1):
        writer.add(f"{number}. ")
        KITCHEN.write(writer, "serve" if number == steps else "step")
        writer.add("\n")
    if writer.chance(0.7):
        _nutrition(writer)


def _nutrition(writer: Writer) -> None:
    """Energy is 9 kcal per gram of fat and 4 per gram of carbohydrate or protein."""
    fat, carbohydrate, protein = writer.integer(2, 40), writer.integer(5, 90), writer.integer(3, 50)
    writer.add("\nNutrition facts per serving:\n")
    start = writer.length
    rows = (
        ("Energy", 9 * fat + 4 * (carbohydrate + protein), "kcal"),
        ("Fat", fat, "g"),
        ("Carbohydrates", carbohydrate, "g"),
        ("Protein", protein, "g"),
        ("Salt", writer.integer(1, 4), "g"),
    )
    for name, amount, unit in rows:
        writer.add(f"{name}: ")
        writer.add(str(amount), "entity:number")
        writer.add(" ")
        writer.add(unit, "entity:unit")
        writer.add("\n")
    writer.label_from(start, "recipe:nutrition")
