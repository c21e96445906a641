use serde_json::json;

use super::*;
use crate::testing::{BYTE_FALLBACK, SMOLLM2};

fn compile(source: &str) -> ChatTemplate {
    let special_tokens = BTreeMap::from([("bos_token".into(), "<s>".into()), ("eos_token".into(), "</s>".into())]);
    ChatTemplate::new(&ChatTemplateSource::from_text(source), &special_tokens, TemplateLimits::default()).unwrap()
}

fn input(messages: &[Json]) -> ChatInput<'_> {
    ChatInput {
        messages,
        tools: None,
        add_generation_prompt: true,
        continue_final_message: false,
        kwargs: None,
        now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
    }
}

/// What `source` makes of one user message.
fn render(source: &str) -> Result<String, TextError> {
    compile(source).render(&input(&[json!({"role": "user", "content": "Hi <b> \u{e9}"})]))
}

#[track_caller]
fn check(source: &str, expected: &str) {
    assert_eq!(render(source).unwrap(), expected, "{source}");
}

#[test]
fn smollm2_chat() {
    let template = ChatTemplate::for_tokenizer(&SMOLLM2, None).unwrap();
    let cases: Vec<Json> = serde_json::from_str(include_str!("../../testdata/smollm2-golden.json")).unwrap();
    let case = cases.iter().find(|case| case["kind"] == "chat").unwrap();
    let messages = [json!({"role": "user", "content": "What is the tallest mountain in the world?"})];
    let prompt = template.render(&input(&messages)).unwrap();
    assert_eq!(prompt, case["prompt"].as_str().unwrap());
    let ids: Vec<u32> = serde_json::from_value(case["input_ids"].clone()).unwrap();
    assert_eq!(SMOLLM2.encode(&prompt, false).unwrap(), ids);
}

#[test]
fn whitespace_as_hugging_face_sets_it() {
    check("{% for m in messages %}\n  {{ m.role }}\n  {% endfor %}\nend\n", "  user\nend");
    check("a\n{%- if true %}\nb\n{%- endif %}", "ab");
    check("a\r\n{% if true %}\r\nb\r\n{% endif %}", "a\nb\n");
}

#[test]
fn generation_tags_are_tolerated() {
    check("a {%- generation -%} b {%- endgeneration -%} c", "abc");
    check("{% generation %}\nx\n{% endgeneration %}\ny", "x\ny");
    check("{{ 'generation {%' }}", "generation {%");
}

#[test]
fn python_notation_of_values() {
    check("{{ true }} {{ none }} {{ [1, 'a', {'k': false}] }}", "True None [1, 'a', {'k': False}]");
    check("{{ tools is none }} {{ documents is defined }} {{ missing is defined }}", "True True False");
    check("{{ bos_token }}{{ eos_token }}{{ pad_token }}", "<s></s>");
}

#[test]
fn methods_and_filters_of_real_templates() {
    check("{{ ' x '.strip() ~ 'a-b-c'.split('-')[-1] ~ 'x</think>y'.split('</think>')[0].rstrip('\\n') }}", "xcx");
    check(
        "{{ 'user'.title() }} {{ 'ab'.startswith('a') }} {{ 'a' in 'ab' }} {{ 'aXb'.lower().upper() }}",
        "User True True AXB",
    );
    check(
        "{{ 'a.b.c'.rsplit('.', 1) }} {{ 'x.py'.removesuffix('.py') }} {{ 'x.py'.removeprefix('y') }}",
        "['a.b', 'c'] x x.py",
    );
    check("{% for k, v in {'items': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}", "items=1;b=2;");
    check("{{ {'a': 1}.get('b', 'none') }} {{ {'keys': 1}.keys() | list }}", "none ['keys']");
    check(
        "{{ messages[0].get('name') is none }} {{ messages[0]['content'][:2] }} {{ messages[::-1] | length }}",
        "True Hi 1",
    );
    check(
        "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
        "3",
    );
    check("{% macro f(x, y=2) %}{{ x + y }}{% endmacro %}{{ f(1) }}{{ f(x=1, y=1) }}", "32");
    check("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | join(',') }}", "user");
    check(
        "{{ messages[0] is mapping }} {{ messages is sequence }} {{ 'x' is string }} {{ x is undefined }}",
        "True True True True",
    );
    check("{%- set x -%} block {%- endset -%}{{ x | trim | indent(2) }}", "block");
}

#[test]
fn tojson_is_json_dumps() {
    check("{{ messages | tojson }}", "[{\"role\": \"user\", \"content\": \"Hi <b> \u{e9}\"}]");
    check(
        "{{ {'a': [1, 2.0, none], 'b': {}} | tojson(indent=2) }}",
        "{\n  \"a\": [\n    1,\n    2.0,\n    null\n  ],\n  \"b\": {}\n}",
    );
    check(
        "{{ {'b': '\u{e9}\u{1F642}', 'a': \"it's & <\"} | tojson(ensure_ascii=true, sort_keys=true) }}",
        "{\"a\": \"it's & <\", \"b\": \"\\u00e9\\ud83d\\ude42\"}",
    );
    check("{{ [1, {'a': true}] | tojson(separators=(',', ':')) }}", "[1,{\"a\":true}]");
    check("{{ {1: 'a\\n\\\"'} | tojson }}", "{\"1\": \"a\\n\\\"\"}");
    assert!(matches!(render("{{ missing | tojson }}"), Err(TextError::Render(_))));
    assert!(matches!(render("{{ 1 | tojson(indnt=2) }}"), Err(TextError::Render(_))));
}

#[test]
fn the_date_is_the_callers() {
    check("{{ strftime_now('%d %b %Y') }}", "14 Nov 2023");
    check("{{ strftime_now is defined }}", "True");
}

#[test]
fn refusals_are_told_apart_from_failures() {
    let source = "{% if messages[0].role == 'user' %}{{ raise_exception('Only system messages, please') }}{% endif %}";
    let error = render(source).unwrap_err();
    assert!(matches!(&error, TextError::Refused(message) if message == "Only system messages, please"), "{error}");
    // Also from inside a macro.
    let source = "{% macro f() %}{{ raise_exception('no') }}{% endmacro %}{{ f() }}";
    assert!(matches!(render(source), Err(TextError::Refused(_))));
    assert!(matches!(render("{{ messages[0].content + 1 }}"), Err(TextError::Render(_))));
    assert!(matches!(render("{% include 'other' %}"), Err(TextError::Render(_))));
}

#[test]
fn broken_templates_are_refused_at_load() {
    let load = |source: &str| {
        ChatTemplate::new(&ChatTemplateSource::from_text(source), &BTreeMap::new(), TemplateLimits::default())
            .err()
            .unwrap()
    };
    let error = load("a\n{% if %}");
    assert!(!error.is_request_error() && error.to_string().contains(":2)"), "{error}");
    let error = load(&"x".repeat((512 << 10) + 1));
    assert!(error.to_string().contains("limit"), "{error}");
}

#[test]
fn tools_choose_their_own_template() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("templates.json");
    let config = json!({"chat_template": [{"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | tojson }}"}]});
    std::fs::write(&path, config.to_string()).unwrap();
    let source = ChatTemplateSource::from_argument(path.to_str().unwrap()).unwrap();
    let template = ChatTemplate::new(&source, &BTreeMap::new(), TemplateLimits::default()).unwrap();
    let messages = [json!({"role": "user", "content": "?"})];
    assert_eq!(template.render(&input(&messages)).unwrap(), "plain");
    let tools = [json!({"type": "function"})];
    let with_tools = ChatInput { tools: Some(&tools), ..input(&messages) };
    assert_eq!(template.render(&with_tools).unwrap(), "[{\"type\": \"function\"}]");
}

#[test]
fn argument_names_a_built_in_or_a_file() {
    let messages = [
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]}),
        json!({"role": "assistant", "content": null, "tool_calls": []}),
    ];
    let built_in = |name: &str| {
        let source = ChatTemplateSource::from_argument(name).unwrap();
        let template = ChatTemplate::new(&source, &BTreeMap::new(), TemplateLimits::default()).unwrap();
        template.render(&input(&messages)).unwrap()
    };
    assert_eq!(built_in("plain"), "Be brief.\n\nUser: Hi\nthere\n\nAssistant: \n\nAssistant:");
    assert_eq!(
        built_in("chatml"),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n\
         <|im_start|>assistant\n"
    );
    let error = ChatTemplateSource::from_argument("no-such-thing").unwrap_err().to_string();
    assert!(error.contains("chatml, plain"), "{error}");
}

#[test]
fn the_plain_form_is_the_last_resort() {
    let messages = [json!({"role": "user", "content": "Hi"})];
    let rendered = |tokenizer, argument| {
        ChatTemplate::for_tokenizer(tokenizer, argument).unwrap().render(&input(&messages)).unwrap()
    };
    assert_eq!(rendered(&BYTE_FALLBACK, None), "User: Hi\n\nAssistant:");
    assert_eq!(rendered(&SMOLLM2, Some("plain")), "User: Hi\n\nAssistant:");
}

#[test]
fn content_is_given_in_the_shape_that_the_template_takes() {
    let text_only = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}";
    let parts_only = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %};{% endfor %}";
    let any = "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p['text'] }}{% endfor %}{% endif %};{% endfor %}";
    let prints = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}";
    let messages = [
        json!({"role": "user", "content": "a"}),
        json!({"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}),
    ];
    for (source, format, expected) in [
        (text_only, ContentFormat::Text, "user:a;user:b\nc;"),
        (parts_only, ContentFormat::Parts, "user:a;user:bc;"),
        (any, ContentFormat::Any, "user:a;user:bc;"),
        (prints, ContentFormat::Text, "user:a;user:b\nc;"),
    ] {
        let template = compile(source);
        assert_eq!(template.content_format(), format, "{source}");
        assert_eq!(template.render(&input(&messages)).unwrap(), expected);
    }
    let image = [json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})];
    let error = compile(text_only).render(&input(&image)).unwrap_err();
    assert!(matches!(&error, TextError::InvalidChat(reason) if reason.contains("messages[0].content[0]")), "{error}");
}

#[test]
fn tool_call_arguments_are_given_in_the_shape_that_the_template_takes() {
    let call = |arguments: &str| {
        [json!({"role": "assistant", "content": null, "name": null,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]})]
    };
    let parsed = compile(
        "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}{{ 'name' in m }}{% endfor %}",
    );
    assert_eq!(parsed.render(&input(&call("{\"x\":1}"))).unwrap(), "{\"x\": 1}False");
    assert_eq!(parsed.render(&input(&call(""))).unwrap(), "{}False");
    let error = parsed.render(&input(&call("{x}"))).unwrap_err();
    assert!(matches!(&error, TextError::InvalidChat(reason) if reason.contains("tool_calls[0]")), "{error}");

    let text = compile(
        "{% for m in messages if m.tool_calls %}{{ 'call ' + m.tool_calls[0].function.arguments }}{% endfor %}",
    );
    assert_eq!(text.render(&input(&call("{\"x\":1}"))).unwrap(), "call {\"x\":1}");
}

#[test]
fn malformed_messages_are_refused() {
    let template = compile("{% for m in messages %}{{ m.content }}{% endfor %}");
    for message in [json!("text"), json!({}), json!({"role": 1})] {
        let error = template.render(&input(&[message])).unwrap_err();
        assert!(matches!(&error, TextError::InvalidChat(reason) if reason.starts_with("messages[0]")), "{error}");
    }
}

#[test]
fn kwargs_are_variables() {
    let kwargs = json!({"enable_thinking": false, "bos_token": "<override>"});
    let messages = [json!({"role": "user", "content": "?"})];
    let template = compile("{{ bos_token }}{{ enable_thinking is defined and enable_thinking is false }}");
    let with_kwargs = ChatInput { kwargs: kwargs.as_object(), ..input(&messages) };
    assert_eq!(template.render(&with_kwargs).unwrap(), "<override>True");
    let reserved = json!({"messages": []});
    let error = template.render(&ChatInput { kwargs: reserved.as_object(), ..input(&messages) }).unwrap_err();
    assert!(matches!(error, TextError::InvalidChat(_)), "{error}");
}

#[test]
fn final_message_is_continued() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let trimming = source.replace("m.content", "m.content | trim");
    let messages = [json!({"role": "user", "content": "Sure, "}), json!({"role": "assistant", "content": "Sure, "})];
    let continuing = ChatInput { add_generation_prompt: false, continue_final_message: true, ..input(&messages) };
    assert_eq!(compile(source).render(&continuing).unwrap(), "<user>Sure, </><assistant>Sure, ");
    assert_eq!(compile(&trimming).render(&continuing).unwrap(), "<user>Sure,</><assistant>Sure,");

    let conflicting = ChatInput { add_generation_prompt: true, ..continuing };
    assert!(matches!(compile(source).render(&conflicting), Err(TextError::InvalidChat(_))));
    assert!(matches!(compile("no messages").render(&continuing), Err(TextError::InvalidChat(_))));
    let silent = [json!({"role": "assistant", "content": null})];
    let continuing = ChatInput { messages: &silent, ..continuing };
    assert!(matches!(compile(source).render(&continuing), Err(TextError::InvalidChat(_))));
    let continuing = ChatInput { messages: &[], ..continuing };
    assert!(matches!(compile(source).render(&continuing), Err(TextError::InvalidChat(_))));
}

/// Templates made to exhaust something. Each must end in an error, whatever the bound that stops it.
const BOMBS: &[&str] = &[
    // Endless work.
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}",
    // Endless output.
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}{% endfor %}",
    "{{ 'x' * 999999999999 }}",
    "{{ ('x' * 99999) * 99999 }}",
    "{{ 'x' | indent(9999999999) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ [1] | tojson(indent=99999999999999999999) }}",
    // Doubling.
    "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(64) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=['x']) %}{% for i in range(64) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}",
    "{% set ns = namespace(s=['x']) %}{% for i in range(64) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    // Endless recursion.
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(0) }}",
    "{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}",
];

#[test]
fn bombs_end_in_errors() {
    for bomb in BOMBS {
        let limits = TemplateLimits { fuel: 200_000, output_bytes: 1 << 20, ..TemplateLimits::default() };
        let template = ChatTemplate::new(&ChatTemplateSource::from_text(*bomb), &BTreeMap::new(), limits).unwrap();
        let error = template.render(&input(&[])).expect_err(bomb);
        assert!(matches!(error, TextError::TemplateLimit { .. } | TextError::Render(_)), "{bomb}: {error}");
    }
}

#[test]
fn deep_values_do_not_overflow_the_stack() {
    let nested = "{% set ns = namespace(a=[], b=[]) %}{% for i in range(20000) %}{% for j in [1, 2] %}\
        {% set ns.a = [[ns.a]] %}{% set ns.b = [[ns.b]] %}{% endfor %}{% endfor %}";
    // 80,000 levels: about 30 MB of stack.
    for (then, expected) in [("", ""), ("{{ ns.a == ns.b }}", "True"), ("{{ ns.a | string | length }}", "160002")] {
        check(&format!("{nested}{then}"), expected);
    }
    let error = render(&format!("{nested}{{{{ ns.a | tojson }}}}")).unwrap_err();
    assert!(matches!(error, TextError::TemplateLimit { limit: "nesting" }), "{error}");
}

#[test]
fn work_that_fuel_does_not_measure_meets_the_deadline() {
    // Every slice of a slice asks all slices below it.
    let source = "{% set ns = namespace(a=[1]) %}{% for i in range(5000) %}{% set ns.a = ns.a[:] %}{% endfor %}";
    let limits = TemplateLimits { deadline: Duration::from_millis(1), ..TemplateLimits::default() };
    let slow = ChatTemplateSource::from_text(source);
    // Finding out the format of messages meets it first.
    let template = ChatTemplate::new(&slow, &BTreeMap::new(), limits);
    let error = template.and_then(|template| template.render(&input(&[]))).unwrap_err();
    assert!(matches!(error, TextError::TemplateLimit { limit: "time" }), "{error}");
}

#[test]
fn deep_sources_do_not_overflow_the_stack() {
    let deep = [
        ("{{ ", "(", "1", ")", " }}"),
        ("{{ ", "not ", "1", "", " }}"),
        ("{{ ", "-", "1", "", " }}"),
        ("{{ ", "1+", "1", "", " }}"),
        ("{{ ", "", "a", ".a", " }}"),
        ("{{ ", "", "a", "()", " }}"),
        ("{{ ", "", "1", "|abs", " }}"),
        ("{{ ", "{1:", "1", "}", " }}"),
        ("{% if 1 %}", "{% elif 1 %}", "", "", "{% endif %}"),
        ("", "{% if 1 %}", "", "{% endif %}", ""),
        ("", "{% for a in b %}", "", "{% endfor %}", ""),
        ("", "{% set x %}", "", "{% endset %}", ""),
    ];
    for (start, open, middle, close, end) in deep {
        let count = 500_000 / (open.len() + close.len());
        let source = [start, &open.repeat(count), middle, &close.repeat(count), end].concat();
        let source = ChatTemplateSource::from_text(source);
        // Some are refused when compiled, others fail or run out of fuel when rendered; all come back.
        let template = ChatTemplate::new(&source, &BTreeMap::new(), TemplateLimits::default());
        let outcome = template.and_then(|template| template.render(&input(&[])));
        assert!(outcome.is_ok() || !outcome.unwrap_err().to_string().contains("panicked"), "{open}{close}");
    }
}

#[test]
fn long_conversations_render() {
    let template =
        ChatTemplate::new(SMOLLM2.chat_template().unwrap(), &BTreeMap::new(), TemplateLimits::default()).unwrap();
    let messages: Vec<Json> = (0..5_000).map(|_| json!({"role": "user", "content": "x".repeat(200)})).collect();
    assert!(template.render(&input(&messages)).unwrap().len() > 1_000_000);
    let long = [json!({"role": "user", "content": "x".repeat(8 << 20)})];
    assert!(template.render(&input(&long)).unwrap().len() > 8 << 20);
    let too_long = [json!({"role": "user", "content": "x".repeat(17 << 20)})];
    assert!(matches!(template.render(&input(&too_long)), Err(TextError::TemplateLimit { limit: "output bytes" })));
}
