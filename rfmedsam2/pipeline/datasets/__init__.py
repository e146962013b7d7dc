"""Raw datasets: conversion of official downloads, synthetic data, checks, splits, submissions."""
