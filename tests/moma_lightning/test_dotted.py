from moma_lightning.dotted import flat


def test_dotted_names():
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_an_empty_dict_is_a_value():
    assert flat({"a": {}, "b": {"c": {}}}) == {"a": {}, "b.c": {}}
