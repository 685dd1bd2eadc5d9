"""The configuration: typed models, and how files and command lines become one."""

from distprune.config.load import dump_config, json_schema, load_config
from distprune.config.schema import Config

__all__ = ["Config", "dump_config", "json_schema", "load_config"]
