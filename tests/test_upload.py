"""Uploads to a local Hub: one commit or none, whatever fails."""
import pytest
import safetensors
import safetensors.torch
from hub_server import OWNER, STRANGER
from huggingface_hub import HfApi, constants
from published import FILES, NAME, REPO

import timm_spa_cli
from timm_spa.hub.card import CardError
from timm_spa.hub.publish import PublishError, publish


def uploads(hub):
    return [r for r in hub.requests if r.startswith('PUT') or '/commit/' in r]


def test_publishing_twice_makes_one_commit(hub, owner, weights_to_publish, dry_run, capsys):
    arguments = ['publish', str(weights_to_publish), '--model', NAME, '--repo', REPO]
    assert timm_spa_cli.main(arguments) == 0
    first = hub.head(REPO)
    assert f'Published: {hub.url}/{REPO}/commit/{first}' in capsys.readouterr().out
    assert len(hub.repositories[REPO].commits) == 2, 'the creation and the upload'
    assert not hub.repositories[REPO].private
    files = hub.files(REPO)
    assert sorted(set(files) - {'.gitattributes'}) == FILES, 'without a pickle'
    assert all(files[name] == (dry_run / name).read_bytes() for name in FILES)

    hub.requests.clear()
    assert timm_spa_cli.main([*arguments, '--replace-card']) == 0
    assert 'Nothing to change' in capsys.readouterr().out
    assert (hub.head(REPO), uploads(hub)) == (first, [])

    weights_to_publish.with_name('README.md').write_text('---\nlicense: mit\n---\nmine')
    assert timm_spa_cli.main(arguments) == 0
    assert f'The README.md of {REPO} is unchanged; --replace-card replaces it.' in capsys.readouterr().out
    assert hub.head(REPO) == first
    weights_to_publish.with_name('summary.csv').unlink()
    assert timm_spa_cli.main([*arguments, '--replace-card']) == 0
    assert len(hub.repositories[REPO].commits) == 3
    assert hub.files(REPO)['README.md'].endswith(b'mine')
    assert 'summary.csv' not in hub.files(REPO), 'it belongs to another run'
    assert '.gitattributes' in hub.files(REPO)

    everything = dict(hub.repositories[REPO].commits[hub.head(REPO)])
    hub.repositories[REPO].commit('main', dict(everything, **{'notes.txt': everything['README.md']}))
    assert timm_spa_cli.main(arguments) == 0
    assert f'Other files of {REPO} are unchanged: notes.txt.' in capsys.readouterr().out


def test_default_repository(hub, owner, weights_to_publish, monkeypatch):
    monkeypatch.setattr('timm_spa.hub.publish.HUB_ORG', 'org')
    publish(weights_to_publish, NAME)
    assert list(hub.repositories) == [REPO]


def test_private_repository(hub, owner, weights_to_publish):
    publish(weights_to_publish, NAME, REPO, private=True)
    assert hub.repositories[REPO].private
    hub.repositories[REPO].private = False
    hub.requests.clear()
    with pytest.raises(PublishError, match='org/.* is public, but --private was given'):
        publish(weights_to_publish, NAME, REPO, private=True)
    assert not uploads(hub)


def test_pull_request(hub, owner, weights_to_publish, monkeypatch):
    publish(weights_to_publish, NAME, REPO)
    first = hub.head(REPO)
    weights_to_publish.with_name('args.yaml').unlink()
    monkeypatch.setenv('HF_TOKEN', STRANGER)  # may propose changes, but not write
    proposed = publish(weights_to_publish, NAME, REPO, create_pr=True)
    assert proposed.changed
    assert proposed.url == f'{hub.url}/{REPO}/discussions/1'
    assert hub.head(REPO) == first
    assert 'args.yaml' not in hub.files(REPO, 'refs/pr/1')
    with pytest.raises(PublishError, match='Tag v1 cannot be set on a pull request, which has no commit'):
        publish(weights_to_publish, NAME, REPO, create_pr=True, tag='v1')


def test_tags_are_never_moved(hub, owner, weights_to_publish):
    publish(weights_to_publish, NAME, REPO, tag='v1')
    first = hub.head(REPO)
    assert hub.head(REPO, 'v1') == first
    assert not publish(weights_to_publish, NAME, REPO, tag='v1').changed
    weights_to_publish.with_name('args.yaml').unlink()
    with pytest.raises(PublishError, match='without the tag v1: it names the previous commit'):
        publish(weights_to_publish, NAME, REPO, tag='v1')
    hub.requests.clear()
    with pytest.raises(PublishError, match=f'already has a tag v1, for commit {first}'):
        publish(weights_to_publish, NAME, REPO, tag='v1')
    assert not uploads(hub)
    assert hub.head(REPO, 'v1') == first
    publish(weights_to_publish, NAME, REPO, tag='v2')
    assert hub.head(REPO, 'v2') == hub.head(REPO)
    hub.fail('POST', '/tag/', status=500)
    with pytest.raises(PublishError, match=f'status 500 .* published as {hub.head(REPO)}, without the tag v3'):
        publish(weights_to_publish, NAME, REPO, tag='v3')


@pytest.mark.parametrize(('token', 'cause'), [
    (None, 'No token on this machine. Log in with `hf auth login`'),
    ('hf_wrong', 'does not accept the token'),
    (STRANGER, f'no permission to write to {REPO}'),
])
def test_publishing_without_permission(hub, weights_to_publish, monkeypatch, token, cause):
    if token:
        monkeypatch.setenv('HF_TOKEN', token)
    with pytest.raises(PublishError, match=f'{cause}.* Nothing was uploaded'):
        publish(weights_to_publish, NAME, REPO)
    assert not uploads(hub)
    assert not hub.repositories
    # an existing repository is refused too
    monkeypatch.setenv('HF_TOKEN', OWNER)
    publish(weights_to_publish, NAME, REPO)
    before = hub.head(REPO)
    monkeypatch.delenv('HF_TOKEN')
    if token:
        monkeypatch.setenv('HF_TOKEN', token)
    weights_to_publish.with_name('args.yaml').unlink()
    hub.requests.clear()
    with pytest.raises(PublishError, match=cause):
        publish(weights_to_publish, NAME, REPO)
    assert not uploads(hub)
    assert hub.head(REPO) == before


def test_no_network(hub, owner, weights_to_publish, monkeypatch):
    hub.fail('GET', 'whoami', drop=True)
    with pytest.raises(PublishError, match=f'{hub.url} does not answer .* Nothing was uploaded'):
        publish(weights_to_publish, NAME, REPO)
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(PublishError, match='http://127.0.0.1:9 does not answer'):
        publish(weights_to_publish, NAME, REPO)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(PublishError, match='HF_HUB_OFFLINE is set. Unset it'):
        publish(weights_to_publish, NAME, REPO)
    with pytest.raises(CardError, match="'name' is not the name of a repository"):
        publish(weights_to_publish, NAME, 'name')


@pytest.mark.quick(4)
@pytest.mark.parametrize('fault', [
    dict(method='POST', pattern='/preupload/', status=503),
    dict(method='POST', pattern='/objects/batch', drop=True),
    dict(method='PUT', pattern='/objects/', status=503),
    dict(method='PUT', pattern='/objects/', drop=True),
    dict(method='POST', pattern='/commit/', status=500),
    dict(method='POST', pattern='/commit/', drop=True),
    dict(method='POST', pattern='/commit/', status=412),
], ids=lambda fault: '-'.join(map(str, fault.values())))
def test_a_failed_upload_changes_nothing_and_can_be_resumed(hub, owner, weights_to_publish, fault):
    publish(weights_to_publish, NAME, REPO)
    before, files = hub.head(REPO), hub.files(REPO)
    hub.large_files.clear()
    changed = {k: v + 1 for k, v in safetensors.torch.load_file(weights_to_publish).items()}
    safetensors.torch.save_file(changed, weights_to_publish)
    hub.fail(**fault)
    with pytest.raises(PublishError) as e:
        publish(weights_to_publish, NAME, REPO)
    message = str(e.value)
    assert {503: 'status 503', 500: 'status 500', 412: 'changed by another commit'}.get(
        fault.get('status'), 'does not answer') in message
    assert f'{REPO} is unchanged. Run the same command again' in message
    assert (hub.head(REPO), hub.files(REPO)) == (before, files)
    hub.heal()
    publish(weights_to_publish, NAME, REPO)
    assert len(hub.repositories[REPO].commits) == 3
    assert hub.files(REPO)['model.safetensors'] != files['model.safetensors']


def test_a_first_upload_that_fails(hub, owner, weights_to_publish):
    hub.fail('POST', '/commit/', status=500)
    with pytest.raises(PublishError, match='exists, but is empty. Run the same command again'):
        publish(weights_to_publish, NAME, REPO)
    assert list(hub.files(REPO)) == ['.gitattributes']
    hub.heal()
    assert publish(weights_to_publish, NAME, REPO).changed


def test_a_commit_whose_response_is_lost(hub, owner, weights_to_publish):
    hub.fail('POST', '/commit/', lose=True)
    with pytest.raises(PublishError, match='has a new commit, .* Run the same command again'):
        publish(weights_to_publish, NAME, REPO)
    hub.heal()
    assert not publish(weights_to_publish, NAME, REPO).changed
    assert sorted(set(hub.files(REPO)) - {'.gitattributes'}) == FILES


def test_another_commit_during_the_upload(hub, owner, weights_to_publish, monkeypatch):
    original = HfApi.create_commit

    def later(*args, **kwargs):
        hub.repositories[REPO].commit('main', {})
        return original(*args, **kwargs)

    monkeypatch.setattr(HfApi, 'create_commit', later)
    with pytest.raises(PublishError, match='was changed by another commit during the upload. .* has a new commit'):
        publish(weights_to_publish, NAME, REPO)
    assert not hub.files(REPO)


def test_a_temporary_failure_is_retried(hub, owner, weights_to_publish):
    hub.fail('PUT', '/objects/', status=503, times=2)
    publish(weights_to_publish, NAME, REPO)
    assert len(hub.repositories[REPO].commits) == 2
