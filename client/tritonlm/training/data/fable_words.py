"""The words and sentences of the stories, by part. Any sentences can be combined: each one names its character."""

from __future__ import annotations

KINDS = (
    "fox", "bear", "owl", "hedgehog", "rabbit", "mouse", "cat", "dog", "sparrow", "heron", "badger", "otter",
    "squirrel", "deer", "wolf", "turtle", "frog", "goose", "goat", "lamb", "pony", "beaver", "mole", "crow",
    "swan", "miller", "baker", "sailor", "tailor", "gardener", "shepherd", "painter", "fiddler", "potter",
    "weaver", "ferryman",
)  # fmt: skip
THINGS = (
    "lantern", "key", "bell", "map", "kite", "drum", "boat", "coat", "hat", "button", "candle", "mirror",
    "basket", "book", "needle", "ladder", "wheel", "feather", "stone", "seed", "cake", "spoon", "kettle", "clock",
    "whistle", "flute", "umbrella", "rope", "shell", "ribbon", "blanket", "letter", "broom", "coin", "ring",
    "violin",
)  # fmt: skip
NAMES = (
    "Mira", "Otto", "Ida", "Bruno", "Nora", "Felix", "Zoë", "Łucja", "José", "Søren", "Åsa", "Amélie", "Iñigo",
    "Tomás", "Chloé", "Jörg", "Renée", "Béla", "Şirin", "Dvořák", "小雨", "美玲", "さくら", "ハル", "민준", "서연",
    "Анна", "Юрий", "Ελένη", "Νίκος",
)  # fmt: skip
PLACES = (
    "at the edge of the wood", "by the slow river", "under the old bridge", "behind the mill",
    "on the windy hill", "near the harbour", "in a crooked house", "beside the frozen lake",
    "at the end of the lane", "above the bakery", "among the apple trees", "in the last house of the village",
)  # fmt: skip
ADJECTIVES = (
    "small", "quiet", "curious", "clever", "lonely", "cheerful", "patient", "stubborn", "gentle", "brave",
    "sleepy", "proud",
)  # fmt: skip
MATERIALS = (
    "silver", "wooden", "red", "broken", "golden", "tiny", "heavy", "painted", "blue", "old", "shining",
    "borrowed",
)  # fmt: skip
OPENING = (
    "Once upon a time there was {a_adjective} {kind} called {name} who lived {place}.",
    "Once upon a time, {place}, there lived {a_kind} whose name was {name}.",
    "Long ago {a_adjective} {kind} named {name} lived {place}.",
    "There was once {a_kind}, {name} by name, who lived {place} and knew every path.",
    "In the days when the winters were longer, {a_adjective} {kind} called {name} lived {place}.",
    "Nobody {place} was as {adjective} as {name} the {kind}.",
    "{name} was {a_kind}, and {her} home was {place}.",
    "Once upon a time {a_kind} called {name} came to live {place}.",
    "Far from any road, {place}, {a_adjective} {kind} named {name} kept house.",
    "Everyone knew {name}, the {adjective} {kind} who lived {place}.",
    "Once there was {a_kind} so {adjective} that people gave {him} a name: {name}.",
    "Of all who lived {place}, {name} the {kind} rose earliest.",
)
THING = (
    "{She} owned almost nothing but {a_material} {thing}.",
    "One morning {name} found {a_material} {thing} on the doorstep.",
    "On a nail by {her} door hung {a_material} {thing}, and {she} loved it dearly.",
    "{Her} grandmother had left {him} {a_thing}, and it was {material}.",
    "What {name} treasured most was {a_thing}.",
    "For seven coins {name} had bought {a_material} {thing} at the market.",
    "Under {her} bed {name} kept {a_thing} that nobody was allowed to touch.",
    "A stranger had once given {name} {a_material} {thing} and walked away without a word.",
    "{name} carried {a_thing} wherever {she} went.",
    "In spring the river washed {a_material} {thing} to {her} feet.",
    "There was {a_thing} in {her} pocket, and it was never far from {her} thoughts.",
    "{name} had made {a_thing} with {her} own hands, and it had come out rather {material}.",
)
WISH = (
    "More than anything {name} wished to see the sea.",
    "{name} wanted to learn the oldest song in the country.",
    "All {she} wanted was a friend to share the evenings with.",
    "{She} dreamt of crossing the mountains before the first snow.",
    "{name} hoped to win the prize at the midsummer fair.",
    "Every night {she} wished that somebody would knock at the door.",
    "{name} had promised to bring light to the people in the valley.",
    "{She} longed to know what lay behind the last hill.",
    "{name} wished to find the place where the river begins.",
    "It was {her} wish to give the best feast of the year.",
    "{name} wanted to send a message to {her} sister across the water.",
    "{She} had made up {her} mind to climb the tower and count the stars.",
)
OBSTACLE = (
    "But a storm came and broke the only bridge.",
    "But the path was guarded by a giant who let nobody pass.",
    "But one grey day the {thing} was gone.",
    "But the snow lay so deep that the door would not open.",
    "But nobody believed that {a_kind} could do such a thing.",
    "But the road was long, and {name} was afraid of the dark.",
    "But a thick fog rose and hid every sign.",
    "But the king had forbidden it.",
    "But {her} purse was empty and the winter was near.",
    "But {name} had lost {her} voice that very week.",
    "But a wall of thorns had grown across the way.",
    "But the {thing} fell into the well with a splash.",
)
FIRST_TRY = (
    "First {name} tried to go around, and came back with wet feet.",
    "{name} shouted until the hills answered, and nothing else did.",
    "{She} waited three days, and then {she} waited three more.",
    "{name} wrote a polite letter, and the wind took it.",
    "{She} pulled with all {her} strength, and fell over backwards.",
    "At first {name} asked the moon, but the moon said nothing.",
    "{name} built a ladder of sticks, and it broke at the third step.",
    "{She} tried to be clever and was only tired.",
    "{name} ran as fast as {she} could, the wrong way.",
    "{She} offered {her} supper in exchange, and was laughed at.",
    "{name} closed {her} eyes and jumped, and landed where {she} had stood.",
    "{She} dug a hole, and found another hole beneath it.",
)
SECOND_TRY = (
    "Then {name} tried again, more slowly, with the {thing} held tight.",
    "On the second day {she} marked every tree with chalk.",
    "Then {she} thought about it for a whole night, and thought of nothing.",
    "The next morning {name} tied the {thing} to a branch, to see what would happen.",
    "Then {she} asked the way of a snail, who was still thinking when {she} left.",
    "After that {name} hid behind a barrel and listened.",
    "{She} hummed a little to keep {her} courage, and went on.",
    "Once more {name} set out, and once more it began to rain.",
    "Then {name} put down the {thing} and wept a little, for that helps too.",
    "{She} counted to a hundred, and then back again.",
    "On the third evening {name} swore that {she} would not give up.",
    "Then {she} tried the window, the chimney and the back door.",
)
HELP = (
    "Then {friend}, {a_other} from the village, came by and sat down beside {him}.",
    '"Why so sad?" asked {friend}, {a_other} with flour on {her} nose.',
    "An old {other} called {friend} had been watching all the while.",
    "Just then {a_other} named {friend} looked over the hedge.",
    "That night {friend} the {other} knocked three times.",
    '"Let me see that {thing}," said {a_other}, whose name was {friend}.',
    "It was {friend}, the {other}, who heard {him} first.",
    "{friend} the {other} had a cart, a rope and a good heart.",
    "Along the road came {a_other}; it was {friend}, and {friend} knew what to do.",
    '"Two see more than one," said {friend} the {other}.',
    "By luck {a_other} called {friend} had lost the same way.",
    "{friend}, {a_other} of few words, nodded and took the other end.",
)
TURN = (
    "Together they turned the {thing} around, and saw what nobody had seen.",
    "The {thing} began to glow, faintly at first and then as bright as noon.",
    '"It was never the {thing}," said {friend}. "It was how you held it."',
    "They shared their bread, and suddenly the way was easy.",
    "With the {thing} in front and {friend} behind, {name} walked straight through.",
    "The giant wanted only to be asked, and {name} asked.",
    "{friend} laughed, {name} laughed, and the ice cracked from shore to shore.",
    "Inside the {thing} lay a note in a hand that {name} knew.",
    "They used the {thing} as a bridge, and it held.",
    "{name} gave the {thing} away, and it came back by evening.",
    "At that moment the fog lifted, and there it all was.",
    "The king heard of it and said that he had only been waiting for somebody brave.",
)
ENDING = (
    "And from that day on {name} was never alone.",
    "So {name} got {her} wish after all, though it looked different from close by.",
    "They were home before dark, and the {thing} hung in its place again.",
    "Ever since, people there say that {a_kind} and {a_thing} bring luck.",
    "{name} still tells the story, and every year the hill gets higher.",
    "And when the wind is right, one can hear them sing.",
    "The {thing} is there to this day, for anybody who needs it.",
    "{friend} stayed for supper, and then for good.",
    "And {name} slept that night as deeply as a stone in a brook.",
    "What became of the giant? He keeps bees now.",
    "They lived quietly and well, and never locked the door again.",
    "And if they have not moved away, they live there still.",
)
CLOSE = (
    "", "", "", "", "🦊", "✨", "🌙 The end.", "The end.", "The end. 🎈", "Good night! 👋🏽",
    "« Fin », said {friend}.", "🏡❤️",
)  # fmt: skip

PARTS = (OPENING, THING, WISH, OBSTACLE, FIRST_TRY, SECOND_TRY, HELP, TURN, ENDING, CLOSE)
