"""Our prompts of each kind, for DreamBooth folders that bring no `<kind>_prompts.txt`: `{0}` a unique token, `{1}` the class."""

#: The paper scores CLIP-T(t) on 10 such prompts and does not publish them,
#: so these are ours: a score on them carries their name, not the paper's.
TEXTURE_PROMPTS = (
    "a {0} {1} made of wood",
    "a {0} {1} made of gold",
    "a {0} {1} made of stone",
    "a {0} {1} made of glass",
    "a {0} {1} made of ice",
    "a {0} {1} covered in moss",
    "a red {0} {1}",
    "a yellow {0} {1}",
    "a blue {0} {1}",
    "a purple {0} {1}",
)

#: Accessories, poses and cameras are the settings of the paper's Figure 10, upper panel, which shows pictures and no list: these are ours too.
ACCESSORY_PROMPTS = (
    "a {0} {1} wearing a red scarf",
    "a {0} {1} wearing a straw hat",
    "a {0} {1} wearing a golden crown",
    "a {0} {1} wearing sunglasses",
    "a {0} {1} wearing headphones",
    "a {0} {1} with a flower on top",
    "a {0} {1} with a blue ribbon",
    "a {0} {1} with a backpack",
)
LIVE_POSES = (
    "a {0} {1} sitting",
    "a {0} {1} lying down",
    "a {0} {1} standing on its hind legs",
    "a {0} {1} running",
    "a {0} {1} jumping",
    "a {0} {1} sleeping",
    "a {0} {1} looking up",
    "a {0} {1} turning its head",
)
OBJECT_POSES = (
    "a {0} {1} lying on its side",
    "a {0} {1} upside down",
    "a {0} {1} tilted to the left",
    "a {0} {1} seen from the back",
    "a {0} {1} floating in the air",
    "a {0} {1} held in a hand",
    "a {0} {1} hanging from a string",
    "a {0} {1} leaning against a wall",
)
CAMERA_PROMPTS = (
    "a close-up of a {0} {1}",
    "a wide shot of a {0} {1}",
    "a {0} {1} seen from above",
    "a {0} {1} seen from below",
    "a {0} {1} seen from the side",
    "a {0} {1} seen from far away",
    "a {0} {1} through a fisheye lens",
    "a {0} {1} in the foreground of a blurred background",
)

#: Kind of prompt, besides DreamBooth's own -> templates for objects, and for live subjects.
PROMPTS = {
    "texture": (TEXTURE_PROMPTS, TEXTURE_PROMPTS),
    "accessory": (ACCESSORY_PROMPTS, ACCESSORY_PROMPTS),
    "pose": (OBJECT_POSES, LIVE_POSES),
    "camera": (CAMERA_PROMPTS, CAMERA_PROMPTS),
}
