//! What protoc says of the messages that are written by hand.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use bytes::Bytes;
use prost::Message;
use prost_types::FileDescriptorSet;

use crate::message::{
    BranchRequest, Finish, FinishReply, InDoubtReply, InDoubtRequest, PrepareReply, SERVICE, Verb, Vote,
};

const FILE: &str = "quorate/commit/v1/participant.proto";

fn protoc(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let program = std::env::var_os("PROTOC").unwrap_or_else(|| "protoc".into());
    let mut command = Command::new(program);
    command.arg(format!("--proto_path={}/proto", env!("CARGO_MANIFEST_DIR"))).args(arguments).arg(FILE);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut child = command.spawn().expect("protoc is there; if not: cargo xtask install");
    child.stdin.take().expect("piped").write_all(input).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "protoc {arguments:?}: {}", output.status);
    output.stdout
}

/// Both ways: what protoc writes is read as this message, and what is written is read by protoc as this text.
#[track_caller]
fn agrees<M: Message + Default + PartialEq + std::fmt::Debug>(name: &str, message: &M, text: &str) {
    let name = format!("quorate.commit.v1.{name}");
    let theirs = protoc(&[&format!("--encode={name}")], text.as_bytes());
    assert_eq!(&M::decode(&*theirs).expect("readable"), message, "{text}");
    let read = protoc(&[&format!("--decode={name}")], &message.encode_to_vec());
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(&String::from_utf8(read).expect("text")), words(text));
}

#[test]
fn messages_are_those_of_the_proto_file() {
    let (version, group, transaction) = (7, "payments".to_owned(), "0123456789abcdef0123456789abcdef".to_owned());
    let body = Bytes::from_static(b"\x00a\xff");
    let branch = BranchRequest { version, group: group.clone(), transaction, participant: "ledger".to_owned(), body };
    agrees(
        "BranchRequest",
        &branch,
        r#"version: 7 group: "payments" transaction: "0123456789abcdef0123456789abcdef" participant: "ledger"
           body: "\000a\377""#,
    );
    for (vote, name) in [(Vote::Yes, "VOTE_YES"), (Vote::ReadOnly, "VOTE_READ_ONLY"), (Vote::No, "VOTE_NO")] {
        let reply = PrepareReply { version, vote: vote.into(), why: "full".to_owned() };
        agrees("PrepareReply", &reply, &format!("version: 7 vote: {name} why: \"full\""));
    }
    for (finish, name) in [(Finish::Done, "FINISH_DONE"), (Finish::Diverged, "FINISH_DIVERGED")] {
        let reply = FinishReply { version, finish: finish.into(), what: "lost".to_owned() };
        agrees("FinishReply", &reply, &format!("version: 7 finish: {name} what: \"lost\""));
    }
    let request = InDoubtRequest { version, group, after: "0a".to_owned() };
    agrees("InDoubtRequest", &request, r#"version: 7 group: "payments" after: "0a""#);
    let reply = InDoubtReply { version, transactions: vec!["0b".to_owned(), "0c".to_owned()], more: true };
    agrees("InDoubtReply", &reply, r#"version: 7 transactions: "0b" transactions: "0c" more: true"#);
}

#[test]
fn methods_are_those_of_the_proto_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("set");
    protoc(&[&format!("--descriptor_set_out={}", file.display())], b"");
    let set = FileDescriptorSet::decode(&*std::fs::read(file).expect("written")).expect("readable");
    let [file] = &set.file[..] else { panic!("one file") };
    let [service] = &file.service[..] else { panic!("one service") };
    assert_eq!(format!("{}.{}", file.package(), service.name()), SERVICE);
    let methods: Vec<_> = service.method.iter().map(|m| (m.name(), m.input_type(), m.output_type())).collect();
    let verbs = [
        (Verb::Prepare, "BranchRequest", "PrepareReply"),
        (Verb::Commit, "BranchRequest", "FinishReply"),
        (Verb::Abort, "BranchRequest", "FinishReply"),
        (Verb::InDoubt, "InDoubtRequest", "InDoubtReply"),
    ];
    assert_eq!(methods.len(), verbs.len());
    for ((verb, input, output), (name, theirs_in, theirs_out)) in verbs.into_iter().zip(methods) {
        assert_eq!(verb.path(), format!("/{SERVICE}/{name}"));
        assert_eq!(theirs_in, format!(".quorate.commit.v1.{input}"));
        assert_eq!(theirs_out, format!(".quorate.commit.v1.{output}"));
    }
    // A field that only the file knows would be missing from the messages above.
    let fields: Vec<_> = file.message_type.iter().map(|m| (m.name(), m.field.len())).collect();
    let known =
        [("BranchRequest", 5), ("PrepareReply", 3), ("FinishReply", 3), ("InDoubtRequest", 3), ("InDoubtReply", 3)];
    assert_eq!(fields, known);
    let values: Vec<_> = file.enum_type.iter().map(|e| (e.name(), e.value.len())).collect();
    assert_eq!(values, [("Vote", 4), ("Finish", 3)]);
}
