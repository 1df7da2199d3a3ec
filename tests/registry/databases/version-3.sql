BEGIN TRANSACTION;
CREATE TABLE aliases (
	alias VARCHAR NOT NULL, 
	model VARCHAR NOT NULL, 
	PRIMARY KEY (alias), 
	FOREIGN KEY(model) REFERENCES models (name) ON DELETE CASCADE
);
INSERT INTO "aliases" VALUES('other','org/first');
CREATE TABLE artifact_entries (
	kind VARCHAR(63) NOT NULL, 
	"key" VARCHAR(64) NOT NULL, 
	path VARCHAR NOT NULL, 
	blob VARCHAR(64) NOT NULL, 
	media_type VARCHAR NOT NULL, 
	PRIMARY KEY (kind, "key", path), 
	FOREIGN KEY(kind, "key") REFERENCES artifacts (kind, "key") ON DELETE CASCADE, 
	FOREIGN KEY(blob) REFERENCES blobs (hash)
);
INSERT INTO "artifact_entries" VALUES('compile-cache','eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee','graph.bin','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','application/vnd.helios.artifact.v1.raw');
CREATE TABLE artifacts (
	kind VARCHAR(63) NOT NULL, 
	"key" VARCHAR(64) NOT NULL, 
	inputs VARCHAR NOT NULL, 
	revision VARCHAR(71) NOT NULL, 
	digest VARCHAR(71) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	producer VARCHAR NOT NULL, 
	created_at_us BIGINT NOT NULL, 
	used_at_us BIGINT NOT NULL, 
	PRIMARY KEY (kind, "key"), 
	FOREIGN KEY(revision) REFERENCES revisions (digest) ON DELETE CASCADE
);
INSERT INTO "artifacts" VALUES('compile-cache','eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee','{}','sha256:1111111111111111111111111111111111111111111111111111111111111111','sha256:9999999999999999999999999999999999999999999999999999999999999999',7,'worker-1',1700000200000000,1700000200000000);
CREATE TABLE blobs (
	hash VARCHAR(64) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	PRIMARY KEY (hash), 
	CONSTRAINT blobs_size CHECK (size_bytes >= 0)
);
INSERT INTO "blobs" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',100);
INSERT INTO "blobs" VALUES('bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',200);
INSERT INTO "blobs" VALUES('cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc',7);
CREATE TABLE conversions (
	source_sha256 VARCHAR(64) NOT NULL, 
	converter VARCHAR NOT NULL, 
	revision VARCHAR(71) NOT NULL, 
	PRIMARY KEY (source_sha256, converter), 
	FOREIGN KEY(revision) REFERENCES revisions (digest) ON DELETE CASCADE
);
INSERT INTO "conversions" VALUES('ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','converter-1','sha256:2222222222222222222222222222222222222222222222222222222222222222');
CREATE TABLE entries (
	revision VARCHAR(71) NOT NULL, 
	path VARCHAR NOT NULL, 
	blob VARCHAR(64) NOT NULL, 
	media_type VARCHAR NOT NULL, 
	PRIMARY KEY (revision, path), 
	FOREIGN KEY(revision) REFERENCES revisions (digest) ON DELETE CASCADE, 
	FOREIGN KEY(blob) REFERENCES blobs (hash)
);
INSERT INTO "entries" VALUES('sha256:1111111111111111111111111111111111111111111111111111111111111111','model.safetensors','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','application/vnd.cncf.model.weight.v1.raw');
INSERT INTO "entries" VALUES('sha256:1111111111111111111111111111111111111111111111111111111111111111','config.json','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','application/vnd.cncf.model.weight.config.v1.raw');
INSERT INTO "entries" VALUES('sha256:2222222222222222222222222222222222222222222222222222222222222222','model.safetensors','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','application/vnd.cncf.model.weight.v1.raw');
INSERT INTO "entries" VALUES('sha256:2222222222222222222222222222222222222222222222222222222222222222','config.json','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','application/vnd.cncf.model.weight.config.v1.raw');
CREATE TABLE model_revisions (
	model VARCHAR NOT NULL, 
	revision VARCHAR(71) NOT NULL, 
	ordinal INTEGER NOT NULL, 
	PRIMARY KEY (model, revision), 
	FOREIGN KEY(model) REFERENCES models (name) ON DELETE CASCADE, 
	FOREIGN KEY(revision) REFERENCES revisions (digest)
);
INSERT INTO "model_revisions" VALUES('org/first','sha256:1111111111111111111111111111111111111111111111111111111111111111',1);
INSERT INTO "model_revisions" VALUES('org/first','sha256:2222222222222222222222222222222222222222222222222222222222222222',2);
INSERT INTO "model_revisions" VALUES('second','sha256:1111111111111111111111111111111111111111111111111111111111111111',1);
CREATE TABLE models (
	name VARCHAR NOT NULL, 
	revision VARCHAR(71) NOT NULL, 
	min_replicas INTEGER NOT NULL, 
	max_replicas INTEGER NOT NULL, 
	engine_settings VARCHAR DEFAULT '{}' NOT NULL, 
	created_at_us BIGINT NOT NULL, 
	PRIMARY KEY (name), 
	FOREIGN KEY(revision) REFERENCES revisions (digest)
);
INSERT INTO "models" VALUES('org/first','sha256:2222222222222222222222222222222222222222222222222222222222222222',1,3,'{"max_context_tokens": 64}',1700000000000000);
INSERT INTO "models" VALUES('second','sha256:1111111111111111111111111111111111111111111111111111111111111111',1,3,'{"max_context_tokens": 64}',1700000000000000);
CREATE TABLE revisions (
	digest VARCHAR(71) NOT NULL, 
	source VARCHAR NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	created_at_us BIGINT NOT NULL, 
	profile VARCHAR NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "revisions" VALUES('sha256:1111111111111111111111111111111111111111111111111111111111111111','dir:/models/tiny',107,1700000000000000,'{"architecture": "LlamaForCausalLM", "dtype": "bfloat16", "kv_bytes_per_token": 4, "layer_count": 2, "max_context_tokens": 128, "parameter_count": 10, "vocabulary_size": 100, "weights_bytes": 20}');
INSERT INTO "revisions" VALUES('sha256:2222222222222222222222222222222222222222222222222222222222222222','dir:/models/tiny',107,1700000100000000,'{"architecture": "LlamaForCausalLM", "dtype": "bfloat16", "kv_bytes_per_token": 4, "layer_count": 2, "max_context_tokens": 128, "parameter_count": 10, "vocabulary_size": 100, "weights_bytes": 20}');
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "schema_version" VALUES(3);
CREATE INDEX entries_by_blob ON entries (blob);
CREATE INDEX models_by_revision ON models (revision);
CREATE INDEX artifacts_by_digest ON artifacts (digest);
CREATE INDEX artifacts_by_revision ON artifacts (revision);
CREATE INDEX model_revisions_by_revision ON model_revisions (revision);
CREATE INDEX aliases_by_model ON aliases (model);
CREATE INDEX artifact_entries_by_blob ON artifact_entries (blob);
COMMIT;
