"""The wordings of the built-in dialogues. `{x}` is the object, by name in a first turn, by "it" or its name later."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "what": (
        "What does {x} do?",
        "What is {x} for?",
        "Explain {x}.",
        "Can you explain {x} to me?",
        "I came across {x}. What does it do?",
        "Tell me about {x}.",
        "Please describe {x}.",
        "what does {x} do",
        "Why would I use {x}?",
        "Could you tell me what {x} is good for?",
        "I need help with {x}.",
        "What should I know about {x}?",
        "Give me a description of {x}, please.",
    ),
    "full": (
        "Show me the full documentation of {x}.",
        "What does the documentation say about {x}? All of it, please.",
        "Print the help text of {x}.",
        "help({x})",
        "I want to read the whole docstring of {x}.",
        "Give me everything the docs have on {x}.",
    ),
    "summary": (
        "Summarise {x} in one sentence.",
        "In one sentence: what is {x}?",
        "Give me a short summary of {x}.",
        "{x}, in short?",
        "Describe {x} briefly.",
        "I have no time. What does {x} do, in a sentence?",
        "tl;dr of {x}?",
    ),
    "first_line": (
        "What is the first line of the documentation of {x}?",
        "Give me the first line of the docstring of {x}.",
        "How does the docstring of {x} begin?",
        "Quote the first line of the help of {x}.",
    ),
    "more": (
        "Tell me more about {x}.",
        "What else do the docs say about {x}?",
        "Is there more to say about {x}?",
        "Any details on {x}?",
        "Go into detail about {x}, please.",
    ),
    "signature": (
        "Show me the signature of {x}.",
        "What is the signature of {x}?",
        "How do I call {x}?",
        "How is {x} called?",
        "Which arguments does {x} accept? Show the signature.",
        "Write down how {x} is declared.",
        "signature of {x}?",
    ),
    "parameters": (
        "Which parameters does {x} have?",
        "List the parameters of {x}.",
        "What arguments does {x} take?",
        "Name the arguments of {x}.",
        "Make a list of the parameters of {x}.",
        "what can I pass to {x}",
    ),
    "count": (
        "How many parameters does {x} have?",
        "How many arguments does {x} take?",
        "Count the parameters of {x}.",
    ),
    "meaning": (
        "What does the argument {p} of {x} mean?",
        "What is {p} in {x}?",
        "Explain the parameter {p} of {x}.",
        "What is the meaning of {p} for {x}?",
        "In {x}, what is {p} for?",
        "What do the docs of {x} say about {p}?",
    ),
    "default": (
        "What is the default of {p} in {x}?",
        "Which value does {p} have in {x} if I leave it out?",
        "Does {p} of {x} have a default?",
        "Must I pass {p} to {x}?",
    ),
    "module": (
        "Which module is {x} in?",
        "Where is {x} defined?",
        "What module does {x} belong to?",
        "In which module do I find {x}?",
        "Where does {x} live?",
    ),
    "import": (
        "How do I import {x}?",
        "Write the import line for {x}.",
        "What do I have to import to use {x}?",
        "Show me how to import {x}.",
    ),
    "kind": (
        "Is {x} a class or a function?",
        "What kind of object is {x}?",
        "Is {x} a function, a class or a module?",
        "What is {x}: a module, a class or a function?",
    ),
    "returns": (
        "What does {x} return?",
        "What is the return value of {x}?",
        "What do I get back from {x}?",
        "Tell me what {x} gives back.",
    ),
    "raises": (
        "Does {x} raise an exception?",
        "Which errors can {x} raise?",
        "When does {x} fail?",
        "What goes wrong with {x}, and when?",
    ),
    "example": (
        "Show me an example of {x}.",
        "Can I see an example for {x}?",
        "Do the docs have an example of {x}?",
        "An example of {x}, please.",
    ),
    "methods": (
        "List the methods of {x}.",
        "Which methods does {x} have?",
        "What methods can I call on {x}?",
        "What can {x} do? Name its methods.",
    ),
    "method": (
        "What does the method {p} of {x} do?",
        "Explain {p} of {x}.",
        "And the method {p} of {x}?",
        "What is {p} in {x} for?",
    ),
    "bases": (
        "What does {x} inherit from?",
        "What are the base classes of {x}?",
        "Is {x} a subclass of something?",
    ),
    "owner": (
        "Which class does {x} belong to?",
        "What class is {x} a method of?",
        "Whose method is {x}?",
    ),
    "functions": (
        "Name some functions of {x}.",
        "Which functions does {x} have? A few are enough.",
        "What functions can I find in {x}?",
    ),
    "goes_on": (
        'How does {x} go on after "{p}"?',
        'In {x}, what follows "{p}"?',
        'Quote what comes after "{p}" in {x}.',
        'I have read {x} as far as "{p}". What comes next?',
    ),
}

PASTED: tuple[str, ...] = (
    "Here is a docstring:\n\n{doc}\n\n{question}",
    "{question}\n\n{doc}",
    "I am reading this:\n\n{doc}\n\n{question}",
    "From the documentation:\n\n{doc}\n\n{question}",
    "{doc}\n\n{question}",
)

IT: dict[str, tuple[str, ...]] = {
    "function": ("it", "it", "this function", "that function", "the function"),
    "method": ("it", "it", "this method", "that method", "the method"),
    "class": ("it", "it", "this class", "that class", "the class"),
    "module": ("it", "it", "this module", "that module", "the module"),
    "topic": ("it", "this", "that", "this topic"),
}

LEAD_INS: tuple[str, ...] = (
    "",
    "",
    "",
    "",
    "",
    "And ",
    "OK. ",
    "Good. ",
    "One more thing: ",
    "Thanks! ",
    "I see. ",
    "Hm. ",
)
NEXT_OBJECT: tuple[str, ...] = (
    "And {x}?",
    "What about {x}?",
    "Now {x}.",
    "And what is {x}?",
    "The same for {x}, please.",
)

GREETINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Hello!", ("Hello! What would you like to know about Python?", "Hello! Ask me about the standard library.")),
    ("Hi", ("Hi! What would you like to know about Python?", "Hi! Which part of Python shall we look at?")),
    ("Hi there!", ("Hi! Ask me about the standard library.", "Hi! How can I help?")),
    ("Good morning.", ("Good morning! Which part of Python shall we look at?", "Good morning! How can I help?")),
    ("Good evening", ("Good evening! What would you like to know about Python?",)),
    ("Hey, are you there?", ("Yes, I am here. What would you like to know?",)),
    ("Can you help me with Python?", ("Yes. Ask me about a module, a class or a function.",)),
    ("I have a question.", ("Go ahead, please.", "Ask me. I know the documentation of Python.")),
    ("What can you do?", ("I answer questions about the documentation of Python's standard library.",)),
)
THANKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Thanks!", ("You are welcome!", "Gladly!")),
    ("Thank you.", ("You are welcome!", "Gladly! Ask me again whenever you like.")),
    ("Thank you very much, that helps.", ("I am glad to hear it.", "You are welcome!")),
    ("Great, thanks.", ("You are welcome!",)),
    ("That is all. Goodbye!", ("Goodbye!", "Goodbye, and good luck with Python!")),
    ("Bye", ("Goodbye!", "Bye! Good luck with Python.")),
    ("Perfect.", ("I am glad that it helps.", "Good. Anything else?")),
    ("OK, I understand.", ("Good. Anything else?", "Good! Ask me again whenever you like.")),
)
WHO: tuple[str, ...] = ("Who are you?", "What is your name?", "who are you", "With whom am I talking?")

NAMES: tuple[str, ...] = ("Ada", "Guido", "Monty", "Iris", "Otto", "Mira", "Felix", "Nora", "Pip", "Sage")
PERSONAS: tuple[str, ...] = (
    "You are {name}, a librarian who knows the Python documentation.",
    "You are {name}, an assistant for programmers.",
    "Your name is {name}. You explain the Python standard library.",
    "You are {name}. Answer from the documentation of Python and from nothing else.",
    "You are {name}, a patient teacher of Python. The user is a beginner who may ask several questions in a row.",
    "Act as {name}, who looks things up in the manual of Python {version} for colleagues.",
)
PLAIN_SYSTEM: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You help people who write Python.",
    "Answer questions about Python.",
    "You are a documentation bot.",
    "Quote the documentation. Do not invent anything.",
    "The user writes Python programs and asks about the standard library. Quote its documentation where you can.",
)
STYLES: dict[str, tuple[str, ...]] = {
    "one_line": (
        "Answer in one line.",
        "You are a terse assistant. Answer in one line.",
        "Give answers of a single line only.",
        "Be brief: one line for each answer.",
    ),
    "upper": ("Write in capital letters.", "Answer in capitals only.", "You shout: every letter is a capital letter."),
    "bullet": (
        "Begin each line of an answer with a dash.",
        "Answer with a list: every line begins with a dash.",
    ),
    "quote": ("Begin every line of an answer with '> '.", "Answer as a quotation: put '> ' before each line."),
    "signed": ("End every answer with a line that says: {name}", "Sign each answer with your name, {name}."),
    "polite": (
        "Be polite: begin every answer with 'With pleasure.'",
        "Begin each answer with the words 'With pleasure.'",
    ),
}
