"""Small models of transformers with random weights, for tests. Importing this needs transformers."""

import transformers
from torch import nn


def tiny_bert(classes=2, *, vocab=20, width=8):
    """The configuration of a BERT with one block and two heads of attention."""
    return transformers.BertConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
        num_labels=classes,
    )


class T5Classifier(nn.Module):
    """The encoder of T5 with a head on the first token, without attention to padding."""

    def __init__(self, config, classes):
        super().__init__()
        self.encoder = transformers.T5EncoderModel(config)
        self.head = nn.Linear(config.d_model, classes)

    def forward(self, input_ids, attention_mask=None):
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return self.head(outputs.last_hidden_state[:, 0])


def _sizes(width, classes):
    return {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 8,
        "intermediate_size": 3 * width // 2,
        "num_labels": classes,
    }


def bert(p, width, classes):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        **_sizes(width, classes),
    )
    return transformers.BertForSequenceClassification(config)


def distilbert(p, width, classes):
    config = transformers.DistilBertConfig(
        vocab_size=50,
        dim=width,
        n_layers=2,
        n_heads=width // 8,
        hidden_dim=3 * width // 2,
        dropout=p,
        attention_dropout=p,
        seq_classif_dropout=p,
        num_labels=classes,
    )
    return transformers.DistilBertForSequenceClassification(config)


def gpt2(p, width, classes):
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=width,
        n_layer=2,
        n_head=width // 8,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        num_labels=classes,
        pad_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2ForSequenceClassification(config)


def llama(p, width, classes):
    config = transformers.LlamaConfig(
        vocab_size=50,
        num_key_value_heads=width // 8,
        pad_token_id=0,
        attention_dropout=p,
        use_cache=False,
        **_sizes(width, classes),
    )
    return transformers.LlamaForSequenceClassification(config)


def vit(p, width, classes):
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        **_sizes(width, classes),
    )
    return transformers.ViTForImageClassification(config)


def t5(p, width, classes):
    config = transformers.T5Config(
        vocab_size=50,
        d_model=width,
        d_kv=8,
        d_ff=3 * width // 2,
        num_layers=2,
        num_heads=width // 8,
        dropout_rate=p,
    )
    return T5Classifier(config, classes)
