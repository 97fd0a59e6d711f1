"""The prompt sets that come with the package: benign, made from templates, with other words in the two halves.

Objects and wordings of the pairs that are reported on do not occur in those that features are chosen on.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

_Half = Literal["choose", "report"]
_Wordings = Mapping[_Half, Sequence[tuple[str, str]]]

_LIBRARY: Mapping[_Half, str] = {
    "choose": """json.dumps collections.Counter textwrap.wrap asyncio.Queue shutil.copytree string.Template math.floor
        zipfile.ZipFile random.shuffle datetime.date heapq.heappush logging.Handler bisect.insort csv.reader
        decimal.Decimal email.message.Message fnmatch.filter glob.glob html.escape io.StringIO""",
    "report": """os.path.join re.compile itertools.chain pathlib.Path functools.reduce threading.Lock statistics.median
        tarfile.TarFile secrets.choice calendar.TextCalendar operator.add socket.socket queue.Queue pickle.dumps
        fractions.Fraction urllib.parse.quote difflib.Differ tempfile.mkdtemp base64.b64encode types.SimpleNamespace""",
}
_THINGS: Mapping[_Half, str] = {
    "choose": "cup,window,blue chair,letter,lamp,old radio,garden gate,bicycle,kettle,umbrella,suitcase,piano,mirror,"
    "ladder,basket,clock,carpet,bread knife,sofa,flower pot",
    "report": "spoon,door,red coat,parcel,candle,television,fence,car,oven,hat,backpack,guitar,picture,broom,bottle,"
    "watch,curtain,wooden spoon,bed,bird house",
}

# Wordings of the positive and of the negative prompt; {x} is an object.
_WORDINGS: Mapping[str, _Wordings] = {
    "import": {
        "choose": (
            ("How do I import {x}?", "Which module is {x} in?"),
            ("Write the import line for {x}.", "Where is {x} defined?"),
            ("Which import statement does {x} need?", "Which package has {x} in it?"),
            ("I want to use {x}. What is the import?", "I want to use {x}. What is its module?"),
            ("Give me the line that imports {x}.", "Give me the name of the module of {x}."),
        ),
        "report": (
            ("What do I have to import to use {x}?", "What module does {x} belong to?"),
            ("Show me how to import {x}.", "In which module do I find {x}?"),
            ("The import of {x}, please.", "The module of {x}, please."),
            ("How can my script import {x}?", "Where does {x} live?"),
            ("Type the import for {x} as code.", "Name the module that holds {x}."),
        ),
    },
    "cannot": {
        "choose": (
            ("Walk to the next room and bring me the {x}.", "Write one sentence about the {x} in the next room."),
            ("Touch the {x} here beside me and tell me how warm it is.", "Name three words that describe a warm {x}."),
            ("Take a photo of my {x} right now.", "Suggest a title for a photo of my {x}."),
            ("Ring my neighbour and ask whether the {x} is there.", "Write a note that asks where the {x} is."),
            ("Who moved my {x} five minutes ago?", "How do I keep a {x} clean?"),
        ),
        "report": (
            ("Please lift the {x} in my hall and carry it upstairs.", "Please tell me what people use a {x} for."),
            ("Look at the {x} behind me. Which colour has it now?", "Which colours are common for a {x}?"),
            ("Paint the {x} in my house tonight.", "Describe a painted {x} in a few words."),
            ("Buy a {x} for me and send it to my flat today.", "Make a list of questions to ask before buying a {x}."),
            ("What does my {x} smell like at this moment?", "What is another word for {x}?"),
        ),
    },
    "polite": {
        "choose": (
            ("Could you please be so kind as to explain {x}? Thank you!", "Explain {x}."),
            ("I would be very grateful if you could tell me about {x}, please.", "Tell me about {x}."),
            ("Please show me an example of {x}, if you have the time. Thanks!", "Show me an example of {x}."),
            ("Good day! Might I ask what {x} returns, please?", "What does {x} return?"),
            ("Sorry to trouble you: could you please summarise {x}?", "Summarise {x}."),
        ),
        "report": (
            ("Would you kindly describe {x} for me, please? Many thanks!", "Describe {x}."),
            ("Please, if it is no trouble, what does {x} do? Thanks in advance.", "What does {x} do?"),
            ("May I please see the signature of {x}? That would be lovely.", "Signature of {x}?"),
            ("Thank you for your help so far. Please list the parameters of {x}.", "List the parameters of {x}."),
            ("Hello! Would you mind telling me which errors {x} can raise?", "Which errors can {x} raise?"),
        ),
    },
}
_EACH = 8  # objects per wording

SHIPPED = tuple(_WORDINGS)
"""import: answered with a line of code, against with a module's name. cannot: what a model that only writes cannot do,
against what it can. polite: the same request, polite and plain, which should be answered alike."""

SHIPPED_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "import": ("```", "import ", "from "),
    "cannot": (),
    "polite": (),
}


def shipped_pairs(name: str) -> list[tuple[str, str, _Half]]:
    """The positive and the negative prompt of every pair of a set, and its half; each wording has other objects."""
    found: list[tuple[str, str, _Half]] = []
    for half, wordings in _WORDINGS[name].items():
        things = _THINGS[half].split(",") if name == "cannot" else _LIBRARY[half].split()
        for w, (positive, negative) in enumerate(wordings):
            chosen = [" ".join(things[(4 * w + i) % len(things)].split()) for i in range(_EACH)]
            found += [(positive.format(x=x), negative.format(x=x), half) for x in chosen]
    return found
