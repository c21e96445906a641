#![doc = "Whole-system tests."]
