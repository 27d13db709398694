"""The words that several registers share: people, places, animals, food, colours, dates, quantities."""

from __future__ import annotations

from saepipe.demo.grammar import Grammar

NAMES = {
    "woman|entity:person": """
        Anna, Maria, Ruth, Clara, Nora, Helen, Alice, Judith, Miriam, Sara, Lydia, Ingrid, Emma, Rosa, Vera, Irene,
        Olga, Tamar, Esther, Martha, Agnes, Paula, Diana, Hannah, Leah, Naomi, Edith, Flora, Grace, Hilda, Iris, Julia,
        Karen, Laura, Mabel, Nina, Olivia, Petra, Rachel, Sophie, Teresa, Ursula, Violet, Wanda, Yael, Zoe, Amina,
        Beatrice, Celia, Dorothy, Elena, Fatima, Greta, Ida, Joan, Katya, Lucia, Mei, Noor, Priya, Rania, Sigrid,
        Thelma, Uma, Valerie, Winifred, Yasmin, Adela, Bianca, Cora""",
    "man|entity:person": """
        Daniel, Peter, Samuel, Adam, Victor, Jonas, Oscar, Simon, Henry, Paul, Marcus, Felix, Hugo, Ivan, Jacob, Karl,
        Leo, Martin, Nathan, Otto, Philip, Robert, Stefan, Thomas, Walter, Aaron, Benjamin, Conrad, David, Elias,
        Frank, George, Harold, Isaac, James, Kofi, Louis, Michael, Noah, Omar, Patrick, Quentin, Ralph, Saul, Tobias,
        Ulrich, Vincent, William, Yusuf, Albert, Boris, Carlos, Dimitri, Edgar, Farid, Gideon, Hassan, Igor, Julian,
        Kenji, Lars, Mateo, Nikolai, Pablo, Rafael, Sven, Theo, Viktor, Wen, Amos""",
    "surname|entity:person": """
        Miller, Cohen, Silva, Novak, Berg, Moreau, Kowalski, Rossi, Haddad, Tanaka, Okafor, Lindgren, Fischer, Petrov,
        Alvarez, Bennett, Carter, Dalton, Ellis, Foster, Garner, Holloway, Ibsen, Jensen, Keller, Lambert, Mercer,
        Norton, Osborne, Parker, Quinn, Ramsey, Sutton, Thorne, Underhill, Vance, Whitaker, Yates, Zimmer, Aldridge,
        Brandt, Castillo, Dubois, Erikson, Fontaine, Grant, Hartman, Ivanova, Jansen, Klein, Laurent, Marsh, Nakamura,
        Olsen, Peretz, Rahman, Schmidt, Toledano, Usman, Varga, Weiss, Xavier, Yamada, Zhang, Abbott, Barlow, Chandra,
        Dreyer, Engel, Farrow""",
    "city|entity:place": """
        London, Haifa, Lisbon, Vienna, Prague, Oslo, Cairo, Kyoto, Lima, Geneva, Krakow, Bergen, Porto, Turin, Dublin,
        Athens, Boston, Chicago, Delhi, Edinburgh, Florence, Granada, Hamburg, Istanbul, Jaffa, Lagos, Madrid, Nairobi,
        Odessa, Paris, Quito, Rome, Seville, Tbilisi, Utrecht, Venice, Warsaw, Zurich, Antwerp, Bristol, Cardiff,
        Dresden, Gdansk, Helsinki, Innsbruck, Jerusalem, Kiel, Leiden, Montreal, Naples, Oxford, Plovdiv, Riga,
        Salzburg, Toronto, Uppsala, Valencia, Wellington, York, Zagreb""",
    "country|entity:place": """
        France, Italy, Spain, Norway, Poland, Egypt, Japan, Peru, Israel, Greece, Portugal, Austria, Kenya, India,
        Brazil, Canada, Sweden, Finland, Ireland, Turkey, Mexico, Chile, Georgia, Morocco, Iceland, Denmark, Hungary,
        Croatia, Nigeria, Vietnam""",
    "river|entity:place": """
        the Danube, the Rhine, the Nile, the Jordan, the Thames, the Loire, the Elbe, the Tagus, the Vistula, the Volga,
        the Ganges, the Amazon, the Hudson, the Tiber, the Seine""",
    "person|entity:person": ["{woman} {surname}", "{man} {surname}"],
    "trade": """
        Shipping, Textile, Insurance, Steel, Timber, Railway, Coffee, Publishing, Energy, Glass, Paper, Tobacco, Foods,
        Chemical, Software, Mining, Clock, Piano, Copper, Salt""",
    "company_form": "Company, Group, Works, Brothers, and Sons, Partners, Holdings, Limited, Trust, Union",
    "organisation|entity:organisation": [
        "{surname} {trade} {company_form}",
        "{city} {trade} {company_form}",
        "University of {city}",
        "Bank of {city}",
        "{city} Museum",
        "{surname} and {surname}",
        "National {trade} Board",
    ],
}

THINGS = {
    "animal|entity:animal": """
        dog, cat, horse, fox, bear, wolf, goat, owl, crow, mouse, rabbit, sheep, donkey, goose, duck, hen, rooster, pig,
        cow, calf, lamb, swan, eagle, hawk, sparrow, heron, raven, badger, otter, beaver, squirrel, hedgehog, deer,
        stag, moose, camel, elephant, lion, tiger, leopard, monkey, parrot, turtle, lizard, snake, frog, toad, salmon,
        trout, whale, dolphin, seal, walrus, penguin, crab, lobster, octopus, spider, beetle, moth, butterfly, ant,
        wasp, bee, cricket, snail""",
    "food|entity:food": """
        bread, soup, rice, cheese, butter, apple pie, honey, stew, fish, lentils, olives, figs, dates, plums, onions,
        potatoes, beans, carrots, cabbage, mushrooms, noodles, dumplings, pancakes, roast chicken, lamb, sausages,
        yoghurt, walnuts, almonds, raisins, chocolate, gingerbread, porridge, biscuits, pickles, salad, omelette""",
    "drink|entity:food": "water, tea, coffee, milk, wine, lemonade, cider, juice, broth, beer",
    "colour|colour": """
        red, white, black, green, blue, grey, brown, yellow, golden, silver, pink, purple, orange, crimson, violet,
        scarlet, ivory, turquoise, pale, dark""",
    "quality|role:adjective": """
        old, small, young, tall, quiet, strange, long, heavy, narrow, broken, empty, warm, cold, wooden, ancient,
        gentle, clever, stubborn, tired, patient, curious, lonely, famous, careless, honest, humble, proud, silent,
        round, sharp, soft, thick, thin, dusty, muddy, smooth, rough, bright, plain, simple, crooked, hollow, sturdy,
        tiny, huge, slender, shabby, elegant, faded, rusty""",
    "manner|role:adverb": """
        slowly, quickly, quietly, carefully, suddenly, gently, gladly, sadly, softly, loudly, patiently, bravely,
        calmly, eagerly, nervously, politely, proudly, silently, swiftly, warmly, wearily, boldly, briefly, clumsily,
        firmly, kindly, lightly, neatly, openly, rarely""",
    "profession|entity:profession": """
        teacher, doctor, farmer, baker, sailor, painter, lawyer, engineer, carpenter, nurse, soldier, judge, merchant,
        tailor, gardener, miner, poet, singer, fisherman, blacksmith, shepherd, weaver, potter, librarian, scholar,
        chemist, pilot, cook, clerk, watchmaker, violinist, architect, surgeon, astronomer, printer""",
}

QUANTITIES = {
    "month|entity:date": """
        January, February, March, April, May, June, July, August, September, October, November, December""",
    "weekday|entity:date": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "season|entity:date": "spring, summer, autumn, winter",
    "digit": "1, 2, 3, 4, 5, 6, 7, 8, 9",
    "any_digit": "0, 5, 1, 2, 3, 4, 6, 7, 8, 9",
    "day": ["{digit}", "1{any_digit}", "2{any_digit}"],
    "year": ["18{any_digit}{any_digit}", "19{any_digit}{any_digit}", "19{any_digit}{any_digit}", "20{decade}"],
    "decade": ["0{any_digit}", "1{any_digit}", "2{any_digit}"],
    "full_date|entity:date": ["{day} {month} {year}", "{month} {day}, {year}"],
    "date|entity:date": ["{day} {month} {year}", "{month} {day}, {year}", "{month} {year}"],
    "count|entity:number": "two, three, four, five, six, seven, eight, nine, ten, twelve, twenty, forty, a hundred",
    "ordinal|entity:number": "first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth",
    "tens|entity:number": ["{digit}0", "{digit}5", "{digit}{any_digit}"],
    "hundreds|entity:number": ["{digit}00", "{digit}50", "{digit}{any_digit}{any_digit}"],
    "thousands|entity:number": ["{digit},000", "{digit}{any_digit},500", "{digit}{any_digit},{digit}00"],
    "clock_hour": "8, 9, 10, 7, 11, 12, 6, 1, 2, 3, 4, 5",
    "clock_minutes": "00, 30, 15, 45, 20, 10, 40, 50, 05, 25",
    "time|entity:time": ["{clock_hour}:{clock_minutes} am", "{clock_hour}:{clock_minutes} pm", "{clock_hour} o'clock"],
    "money|entity:money": ["${tens}", "${hundreds}", "${thousands}", "{thousands} euros", "{hundreds} pounds"],
}

LEXICON = Grammar(NAMES | THINGS | QUANTITIES)
"""The grammar that is the parent of every register's own."""

CAPITAL = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Poland": "Warsaw", "Egypt": "Cairo",
    "Peru": "Lima", "Israel": "Jerusalem", "Greece": "Athens", "Austria": "Vienna", "Kenya": "Nairobi",
    "Finland": "Helsinki", "Ireland": "Dublin", "Georgia": "Tbilisi", "Croatia": "Zagreb", "Portugal": "Lisbon",
}  # fmt: skip
"""Countries with their capitals: facts that a model can learn by heart."""
