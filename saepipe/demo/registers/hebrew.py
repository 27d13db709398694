"""Hebrew text, where verbs and adjectives agree with the gender of their noun."""

from __future__ import annotations

from saepipe.demo.grammar import Grammar, Writer

# In each pair of lists the masculine and the feminine form stand at the same rank, so their frequencies agree.
HEBREW = Grammar(
    {
        "m_person|entity:person,hebrew:masculine": """
            דוד, משה, יוסף, אברהם, יצחק, דניאל, נועם, איתן, עומר, יונתן, אורי, גיל, רון, שמואל, אלי, עמית, תומר, ניר,
            חיים, בועז""",
        "f_person|entity:person,hebrew:feminine": """
            שרה, רחל, לאה, מרים, נועה, תמר, יעל, דנה, רות, אסתר, חנה, מיכל, שירה, טליה, הילה, ענת, אורית, נעמי, גלית,
            סיגל""",
        "m_noun|role:noun,hebrew:masculine": """
            ילד, איש, מורה, כלב, חתול, בית, ספר, רופא, שוטר, סוס, מלך, זקן, שכן, חבר, נהר, הר, עץ, שוק, רחוב, חלון,
            שולחן, כיסא, ים, גשר, טבח, חייל, גן, מכתב""",
        "f_noun|role:noun,hebrew:feminine": """
            ילדה, אישה, תלמידה, ציפור, מכונית, עיר, דלת, רופאה, שכנה, חברה, מלכה, תמונה, מסעדה, חנות, מתנה, גינה, עוגה,
            שמלה, סירה, ספרייה, תחנה, מחברת, אחות, סבתא, דירה, שעה, כוס, מפה""",
        "m_adjective|role:adjective,hebrew:masculine": """
            גדול, קטן, יפה, חדש, ישן, טוב, רע, שמח, עצוב, חכם, חזק, עייף, לבן, שחור, אדום, כחול, ירוק, ארוך, קצר, חם,
            קר, שקט, מהיר, יקר, זול, מפורסם""",
        "f_adjective|role:adjective,hebrew:feminine": """
            גדולה, קטנה, יפה, חדשה, ישנה, טובה, רעה, שמחה, עצובה, חכמה, חזקה, עייפה, לבנה, שחורה, אדומה, כחולה, ירוקה,
            ארוכה, קצרה, חמה, קרה, שקטה, מהירה, יקרה, זולה, מפורסמת""",
        "m_went|role:verb,hebrew:masculine": """
            הלך, רץ, ישב, עמד, ישן, שר, רקד, חזר, עבד, צחק, בכה, חיכה, נסע, שתק, קפץ, שמח""",
        "f_went|role:verb,hebrew:feminine": """
            הלכה, רצה, ישבה, עמדה, ישנה, שרה, רקדה, חזרה, עבדה, צחקה, בכתה, חיכתה, נסעה, שתקה, קפצה, שמחה""",
        "m_saw|role:verb,hebrew:masculine": """
            ראה, אהב, שמע, קנה, מכר, פתח, סגר, כתב, קרא, אכל, מצא, איבד, שלח, קיבל, צייר, ניקה, שבר, שכח, זכר, בנה""",
        "f_saw|role:verb,hebrew:feminine": """
            ראתה, אהבה, שמעה, קנתה, מכרה, פתחה, סגרה, כתבה, קראה, אכלה, מצאה, איבדה, שלחה, קיבלה, ציירה, ניקתה, שברה,
            שכחה, זכרה, בנתה""",
        "city|entity:place": """
            ירושלים, חיפה, יפו, באר שבע, אילת, נצרת, צפת, טבריה, עכו, רמת גן, אשדוד, חולון, נתניה, חברון, עפולה""",
        "place|role:noun": "הבית, השוק, הגן, הים, הרחוב, הספרייה, התחנה, הכפר, היער, המסעדה, החנות, הגשר, בית הספר",
        "food|entity:food": "לחם, מרק, גבינה, תפוח, דג, אורז, סלט, עוגה, דבש, חלב, קפה, תה, ענבים, זיתים, תמרים, ביצה",
        "time|entity:date": """
            היום, אתמול, בבוקר, בערב, בלילה, בשבת, ביום ראשון, ביום שני, בקיץ, בחורף, לפני שנה, אחרי הגשם, בצהריים,
            ביום שישי, באביב""",
        "manner|role:adverb": "לאט, מהר, בשקט, בשמחה, לבד, יחד, שוב, תמיד, פתאום, בזהירות",
        "joined|role:conjunction": "כי, אבל, ואז, למרות ש, כאשר",
        "m_subject|role:subject": ["{m_person@m_hero}", "ה{m_noun}", "ה{m_noun@m_thing} ה{m_adjective}", "הוא"],
        "f_subject|role:subject": ["{f_person@f_hero}", "ה{f_noun}", "ה{f_noun@f_thing} ה{f_adjective}", "היא"],
        "object|role:object": [
            "את ה{m_noun}",
            "את ה{f_noun}",
            "{m_noun} {m_adjective}",
            "{f_noun} {f_adjective}",
            "את ה{m_noun@m_thing} ה{m_adjective}",
            "את ה{f_noun@f_thing} ה{f_adjective}",
            "{food}",
            "את {m_person@m_hero}",
        ],
        "where": ["ב{city@town}", "ליד {place}", "אל {place}", "מ{city}", "על יד ה{m_noun}", "עם {f_person@f_hero}"],
        "m_clause": [
            "{m_subject} {m_saw} {object}",
            "{m_subject} {m_went} {where}",
            "{m_subject} {m_went} {manner}",
            "{m_subject} היה {m_adjective}",
            "{m_subject} {m_saw} {object} ו{m_went} {where}",
        ],
        "f_clause": [
            "{f_subject} {f_saw} {object}",
            "{f_subject} {f_went} {where}",
            "{f_subject} {f_went} {manner}",
            "{f_subject} הייתה {f_adjective}",
            "{f_subject} {f_saw} {object} ו{f_went} {where}",
        ],
        "clause": ["{m_clause}", "{f_clause}"],
        "sentence": [
            "{clause}.",
            "{time} {clause}.",
            "{clause} {joined} {clause}.",
            "{time}, {clause}, {joined} {clause}.",
            "האם {clause}?",
            '"{clause|quote:inside}", אמר {m_person@m_hero}.',
            '"{clause|quote:inside}", אמרה {f_person@f_hero}.',
            "איזה {m_noun} {m_adjective}!",
            "ב{city@town} יש {m_noun} {m_adjective} ו{f_noun} {f_adjective}.",
        ],
    },
    closed_class=False,
)


def hebrew(writer: Writer) -> None:
    """A few paragraphs about one man, one woman and one town."""
    start = writer.length
    for paragraph in range(writer.integer(1, 3)):
        if paragraph:
            writer.add("\n")
        HEBREW.repeat(writer, "sentence", 6, 10)
    writer.label_from(start, "hebrew")
    writer.add("\n")
