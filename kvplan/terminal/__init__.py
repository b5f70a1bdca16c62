"""Answers for people: terminal tables. Everything here reads plans and prints; nothing computes."""
