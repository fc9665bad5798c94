"""A small world in stories: who is where, who carries what, what colour it is, what happens and why.  Usage: python demo/world.py

A story is simulated first and worded second: nearly every sentence changes the state of the world or follows from it, so a reader
who remembers the earlier sentences can predict the later ones. An item of a task is a story cut inside a sentence that follows.
"""

import json
from itertools import count, islice
from pathlib import Path
from random import Random

SEED = 0
N_TRAIN, N_TEST, N_ITEMS = 560, 280, 250  # stories of train.txt (the first of the training text) and of test.txt; items of each task

WOMEN = ["Anna", "Clara", "Emma", "Grace", "Ida", "Kate", "Mary", "Olga"]
MEN = ["Ben", "David", "Frank", "Henry", "Jack", "Leo", "Noah", "Peter"]
PEOPLE = dict.fromkeys(WOMEN, "she") | dict.fromkeys(MEN, "he")
HIM = {"he": "him", "she": "her"}
ROOFED = {name: f"in the {name}" for name in ("attic", "barn", "cave", "cellar", "kitchen", "library", "mill", "school", "shop", "tower")}
OPEN = {name: f"in the {name}" for name in ("field", "forest", "garden", "street", "valley")}
OPEN |= {"beach": "on the beach", "bridge": "on the bridge", "hill": "on the hill", "lake": "by the lake", "river": "by the river"}
PLACES = ROOFED | OPEN
FRAGILE = ["bottle", "bowl", "cup", "jar", "lamp", "mirror", "plate", "vase"]
THINGS = FRAGILE + ["ball", "basket", "blanket", "book", "boot", "coat", "coin", "drum"]
THINGS += ["hammer", "hat", "key", "kite", "ring", "rope", "spoon", "whistle"]
COLOURS = ["black", "blue", "brown", "green", "grey", "red", "white", "yellow"]
FOODS = {"apples": "an apple", "cakes": "a cake", "carrots": "a carrot", "eggs": "an egg", "nuts": "a nut"}
FOODS |= {"onions": "an onion", "pears": "a pear", "pies": "a pie", "plums": "a plum", "rolls": "a roll"}
SOUNDS = {"cat": "purred", "cow": "mooed", "dog": "barked", "donkey": "brayed"}
SOUNDS |= {"duck": "quacked", "goat": "bleated", "hen": "clucked", "pig": "grunted"}
PETS = ["Bolt", "Dot", "Fluff", "Misty", "Pip", "Rusty", "Smoke", "Velvet"]
DEEDS = ["baked", "cried", "danced", "drew", "dug", "hummed", "jumped", "knelt", "laughed", "painted"]
DEEDS += ["prayed", "rested", "sang", "slept", "sneezed", "waited", "whistled", "worked", "wrote", "yawned"]
OPPOSITES = {"got wet.": "stayed dry.", "was afraid.": "stayed calm.", "broke.": "stayed whole."}
OPPOSITES |= {right: left for left, right in OPPOSITES.items()}


def habit(person, place):
    """What a person does on coming to a place, in all stories: it follows from no rule, so a model has to know it by heart."""
    return Random(f"{person} {place}").choice(DEEDS)


def is_held_out(hero, thing, place):
    """One combination in eight opens held-out stories only (test text and tasks), the others open training stories only."""
    return (list(PEOPLE).index(hero) + THINGS.index(thing) + list(PLACES).index(place)) % 8 == 0


class Story:
    """The state of one small world and the sentences told about it so far."""

    def __init__(self, rng, held_out):
        self.rng = rng
        while True:
            self.people, self.things, self.places = rng.sample(list(PEOPLE), 3), rng.sample(THINGS, 2), rng.sample(list(PLACES), 4)
            if is_held_out(self.people[0], self.things[0], self.places[0]) == held_out:
                break
        self.pet, self.animal, self.owner = rng.choice(PETS), rng.choice(list(SOUNDS)), rng.choice(self.people)
        self.colour = dict(zip(self.things, rng.sample(COLOURS, 2), strict=True))
        # a story is either about what they like to eat or about who is brave
        self.likes = dict(zip(self.people, rng.sample(list(FOODS), 3), strict=True)) if rng.random() < 0.5 else {}
        self.brave = {person: rng.random() < 0.5 for person in self.people}
        hero, friend, third = self.people
        self.at = {hero: self.places[0], friend: rng.choice(self.places[:2]), third: rng.choice(self.places[1:])}  # who or what -> place
        self.at |= {self.pet: self.at[self.owner], self.things[1]: rng.choice(self.places)}
        self.holder = {self.things[0]: hero}  # thing -> person; the thing is then where the person is
        self.told = []  # sentences
        self.begin()

    # wording

    def say(self, sentence):
        self.told.append(sentence[0].upper() + sentence[1:])

    # what is so

    def place(self, what):
        return self.at[self.holder.get(what, what)]

    def there(self, what):
        return PLACES[self.place(what)]

    def elsewhere(self, what):
        return self.rng.choice([place for place in self.places if place != self.at[what]])

    def near(self, person, others):
        return [other for other in others if other != person and self.place(other) == self.at[person]]

    def lying(self):
        return [thing for thing in self.things if thing not in self.holder]

    def consequences(self):
        """What can befall all, and how each then fares: {cause: {who or what: end of the sentence}}."""
        fares = {
            "It began to rain.": {p: "stayed dry." if self.at[p] in ROOFED else "got wet." for p in self.people},
            "The ground shook.": {f"The {thing}": "broke." if thing in FRAGILE else "stayed whole." for thing in self.things},
        }
        if self.likes:
            return fares | {"They were hungry.": {p: f"ate {FOODS[self.likes[p]]}." for p in self.people}}
        return fares | {"They heard thunder.": {p: "stayed calm." if self.brave[p] else "was afraid." for p in self.people}}

    # the beginning and the end

    def begin(self):
        (hero, friend, third), (mine, other) = self.people, self.things
        self.say(
            f"{self.rng.choice(('one day', 'long ago', 'last summer'))} {hero} was {self.there(hero)} with a {self.colour[mine]} {mine}."
        )
        facts = [f"{friend} was {self.there(friend)}.", f"{third} was {self.there(third)}."]
        facts += [f"{self.owner} had a {self.animal} called {self.pet}."]
        facts += [f"there was a {self.colour[other]} {other} {self.there(other)}."]
        for person in self.people:
            trait = f"liked {self.likes[person]}" if self.likes else "was brave" if self.brave[person] else "was timid"
            facts.append(f"{person} {trait}.")
        for fact in self.rng.sample(facts, len(facts)):
            self.say(fact)

    def end(self):
        ends = [f"{person} was {self.there(person)}." for person in self.people] + [f"{self.pet} was {self.there(self.pet)}."]
        for thing in self.things:
            ends.append(f"the {thing} was {f'with {self.holder[thing]}' if thing in self.holder else self.there(thing)}.")
        first, *others = self.rng.sample(ends, len(ends))
        for end in (f"in the end {first}", *others):
            self.say(end)

    # what can happen in between: each returns whether it did

    def go(self):
        person = self.rng.choice(self.people)
        place = self.elsewhere(person)
        self.say(f"{self.rng.choice(('then ', 'soon ', ''))}{person} went to the {place} and {habit(person, place)}.")
        follows = person == self.owner and self.at[self.pet] == self.at[person] and self.rng.random() < 0.7
        self.at[person] = place
        if follows:
            self.at[self.pet] = place
            self.say(f"{self.pet} followed {HIM[PEOPLE[person]]} to the {place}.")
        return True

    def take(self):
        pairs = [(person, thing) for person in self.people for thing in self.near(person, self.lying())]
        if not pairs:
            return False
        person, thing = self.rng.choice(pairs)
        self.say(f"{person} took the {thing}.")
        del self.at[thing]
        self.holder[thing] = person
        return True

    def leave(self):
        if not self.holder:
            return False
        thing = self.rng.choice(list(self.holder))
        person = self.holder.pop(thing)
        self.at[thing] = self.at[person]
        self.say(f"{person} {self.rng.choice(('left', 'hid'))} the {thing} {self.there(thing)}.")
        return True

    def give(self):
        pairs = [(thing, other) for thing, person in self.holder.items() for other in self.near(person, self.people)]
        if not pairs:
            return False
        thing, other = self.rng.choice(pairs)
        self.say(f"{self.holder[thing]} gave the {thing} to {other}.")
        self.holder[thing] = other
        return True

    def ask(self):
        asker, answerer = self.rng.sample(self.people, 2)
        thing = self.rng.choice(self.things)
        holder = self.holder.get(thing)
        if holder == asker:
            return False
        if self.rng.random() < 0.3:
            question, answer = f"What colour is the {thing}?", f"It is {self.colour[thing]}"
        else:
            question = f"Where is the {thing}?"
            answer = f"It is {self.there(thing)}" if holder is None else "I have it" if holder == answerer else f"{holder} has it"
        self.say(f'"{question}" asked {asker}. "{answer}," said {answerer}.')
        return True

    def run(self):
        if self.at[self.pet] == self.at[self.owner]:
            away = self.at[self.pet] = self.elsewhere(self.pet)
            self.say(f"{self.pet} {SOUNDS[self.animal]} and ran away to the {away}.")
        else:
            self.at[self.pet] = self.at[self.owner]
            self.say(f"{self.pet} {SOUNDS[self.animal]} and ran back to {self.owner}.")
        return True

    def befall(self):
        cause, fares = self.rng.choice(list(self.consequences().items()))
        if cause in self.told:
            return False
        self.say(cause)
        for what in self.rng.sample(list(fares), len(fares)):
            self.say(f"{what} {fares[what]}")
        return True

    def go_on(self):
        """3 to 6 events, drawn until that many were possible."""
        n_events = self.rng.randint(3, 6)
        while n_events:
            n_events -= self.rng.choices(list(EVENTS), EVENTS.values())[0](self)

    # what the tasks ask: (stem, choices, the right one), or None where the question has no answer

    def deed(self):
        person = self.rng.choice(self.people)
        place = self.elsewhere(person)
        right = habit(person, place)
        others = self.rng.sample([deed for deed in DEEDS if deed != right], 3)
        return f"{person} went to the {place} and", self.rng.sample([f"{deed}." for deed in [right, *others]], 4), f"{right}."

    def why(self):
        cause, fares = self.rng.choice(list(self.consequences().items()))
        if cause in self.told:
            return None
        what, other = self.rng.sample(list(fares), 2)
        return f"{cause} {what}", sorted([fares[what], OPPOSITES.get(fares[what], fares[other])]), fares[what]

    def text(self):
        return " ".join(self.told)


EVENTS = {Story.go: 6, Story.take: 4, Story.leave: 2, Story.give: 5, Story.ask: 4, Story.run: 2, Story.befall: 3}  # how often each is drawn
TASKS = {"world_deed": Story.deed, "world_why": Story.why}


def stories(seed, held_out=False):
    """Endless stories, each on one line."""
    rng = Random(seed)
    while True:
        story = Story(rng, held_out)
        story.go_on()
        story.end()
        yield story.text()


def items(task, seed):
    """Endless items of a task: a held-out story up to the stem of a sentence, and choices to go on, of which each in turn is the answer."""
    rng = Random(f"{task} {seed}")
    for turn in count():
        while True:
            story = Story(rng, held_out=True)
            story.go_on()
            stem, choices, right = TASKS[task](story) or ("", [""], "")
            if right and choices.index(right) == turn % len(choices):
                break
        yield {"context": f"{story.text()} {stem}", "choices": choices, "answer": choices.index(right)}


def write(folder):
    """Write the corpus (`data/world/{train,test}.txt`) and the tasks (`tasks/*.jsonl`) under `folder`."""
    files = {"data/world/train.txt": islice(stories(SEED), N_TRAIN), "data/world/test.txt": islice(stories(SEED, held_out=True), N_TEST)}
    files |= {f"tasks/{task}.jsonl": map(json.dumps, islice(items(task, SEED), N_ITEMS)) for task in TASKS}
    for name, lines in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(__file__).parent)
